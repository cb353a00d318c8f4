//! Events to containerd: one queue, delivered in order, whatever has to be tried again.

mod publish;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use husk_proto::containerd::shim::event::Envelope;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};

pub use publish::{Destination, PublishError};

/// Events waiting at most; containerd gone for long must not cost the node its memory.
const MAX_WAITING: usize = 4096;

/// Delivers one event.
#[async_trait::async_trait]
pub trait Publish: Send {
    /// Hands the event over, once.
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError>;
}

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The queue's end that takes events.
#[derive(Clone)]
pub struct Events {
    namespace: Arc<str>,
    queue: mpsc::UnboundedSender<Item>,
    waiting: Arc<AtomicUsize>,
}

/// How long delivery of one event is tried.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until it is given up.
    pub total: Duration,
    /// Before the second try; doubled for each one after that.
    pub first_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { total: Duration::from_secs(30), first_pause: Duration::from_millis(20) }
    }
}

impl Events {
    /// Starts the delivery on the current runtime.
    pub fn start(namespace: &str, publisher: impl Publish + 'static, patience: Patience) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        tokio::spawn(deliver(items, Arc::clone(&waiting), publisher, patience));
        Self { namespace: namespace.into(), queue, waiting }
    }

    /// Puts an event at the end of the queue.
    pub fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(topic, "event dropped: too many wait for containerd");
            return;
        }
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, %error, "event cannot be encoded"),
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.to_string(),
            topic: topic.to_owned(),
            // containerd's typeurl wants the bare message name.
            event: Some(Any { type_url: M::descriptor().full_name().to_owned(), value, ..Default::default() }).into(),
            ..Default::default()
        };
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until everything queued so far was delivered or given up, at most this long.
    pub async fn flush(&self, at_most: Duration) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() && tokio::time::timeout(at_most, wait).await.is_err() {
            tracing::warn!(waiting = self.waiting.load(Ordering::Relaxed), "events not delivered in time");
        }
    }
}

/// Delivers one event after the other: the next one waits while this one is tried again.
///
/// What failed is sent again, though containerd may have had it: when the connection breaks, or the time is up, after it
/// has read the request and before its answer came. So an event is delivered at least once, and once unless containerd
/// itself is stuck or killed at that moment. Nothing in the protocol could tell it that it has seen an event (ttrpc's
/// `Forward` has no id, and containerd hands on what it gets), and not to send it again would lose ends of containers, for
/// which kubelet and containerd's own CRI wait; both take an end that they know of for no news.
async fn deliver(
    mut items: mpsc::UnboundedReceiver<Item>,
    waiting: Arc<AtomicUsize>,
    mut publisher: impl Publish,
    patience: Patience,
) {
    while let Some(item) = items.recv().await {
        let event = match item {
            Item::Event(event) => event,
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let give_up = tokio::time::Instant::now() + patience.total;
        let mut pause = patience.first_pause;
        while let Err(error) = publisher.publish(&event).await {
            if tokio::time::Instant::now() + pause > give_up {
                tracing::error!(topic = event.topic, error = %crate::chain(&error), "event given up");
                break;
            }
            tracing::debug!(topic = event.topic, error = %crate::chain(&error), "event not delivered, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A protobuf timestamp.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_proto::containerd::events::task::{TaskExit, TaskStart};
    use std::sync::Mutex;

    struct Flaky {
        fails: usize,
        seen: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait::async_trait]
    impl Publish for Flaky {
        async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
            if self.fails > 0 {
                self.fails -= 1;
                return Err(PublishError::Nowhere);
            }
            self.seen.lock().unwrap().push(format!("{} {}", event.topic, event.event.type_url));
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn order_is_kept_over_retries() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let events = Events::start("default", Flaky { fails: 3, seen: Arc::clone(&seen) }, Patience::default());
        events.publish("/tasks/start", &TaskStart::new());
        events.publish("/tasks/exit", &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(
            *seen.lock().unwrap(),
            ["/tasks/start containerd.events.TaskStart", "/tasks/exit containerd.events.TaskExit"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_event_does_not_stop_the_next() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let patience = Patience { total: Duration::from_secs(1), first_pause: Duration::from_millis(400) };
        let events = Events::start("default", Flaky { fails: 2, seen: Arc::clone(&seen) }, patience);
        events.publish("/tasks/start", &TaskStart::new());
        events.publish("/tasks/exit", &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(*seen.lock().unwrap(), ["/tasks/exit containerd.events.TaskExit"]);
    }
}
