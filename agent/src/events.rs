//! The event hub: sends process exits, OOM kills and connections to sockets of the node to all subscribers, in order.

use std::sync::{Arc, Mutex};

use husk_base::sync::lock;
use husk_proto::agent::{Event, Exit, HostSocket, Oom};
use tokio::sync::mpsc;

/// Sends events to all subscribers. Clones share the same subscribers.
#[derive(Clone, Default)]
pub struct EventHub {
    subscribers: Arc<Mutex<Vec<mpsc::UnboundedSender<Event>>>>,
}

impl EventHub {
    /// Subscribes to all events from now on.
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<Event> {
        let (sender, receiver) = mpsc::unbounded_channel();
        lock(&self.subscribers).push(sender);
        receiver
    }

    /// Publishes an exit.
    pub fn exit(&self, exit: Exit) {
        let mut event = Event::new();
        event.set_exit(exit);
        self.publish(event);
    }

    /// Publishes an OOM kill.
    pub fn oom(&self, container_id: &str) {
        let mut event = Event::new();
        event.set_oom(Oom { container_id: container_id.to_owned(), ..Default::default() });
        self.publish(event);
    }

    /// Publishes a connection to a socket of the node.
    pub fn host_socket(&self, request: HostSocket) {
        let mut event = Event::new();
        event.set_host_socket(request);
        self.publish(event);
    }

    fn publish(&self, event: Event) {
        lock(&self.subscribers).retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }
}
