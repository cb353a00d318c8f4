//! Records containerd's task events of each container, in order of arrival.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;

use crate::{KUBERNETES, containerd, grpc, node};

/// Timeout for an event to arrive.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A subscription to containerd's events, and the task events received so far.
pub struct Events {
    arriving: Receiver<Vec<u8>>,
    /// Container id and description of each event.
    seen: RefCell<Vec<(String, String)>>,
    /// Number of the last marker event ([`Events::mark`]).
    marker: Cell<u32>,
}

impl Events {
    /// Subscribes to the events. All events that are sent after this function returns are recorded.
    #[track_caller]
    pub fn watch() -> Self {
        let arriving = grpc::stream("containerd.services.events.v1.Events", "Subscribe");
        let events = Self { arriving, seen: RefCell::default(), marker: Cell::default() };
        // containerd does not report when it has registered the subscription. Marker events that are published earlier
        // do not arrive. Therefore this function publishes marker events until one of them arrives.
        let subscribed = node::eventually(TIMEOUT, || {
            let marker = events.mark();
            events.receive(Instant::now() + Duration::from_millis(100), |topic| topic == marker).then_some(())
        });
        assert!(subscribed.is_some(), "no event has arrived from containerd after the subscription");
        events
    }

    /// Returns the events of a container: `create`, `start`, `exec-added ID`, `exec-started ID`, `exit STATUS`,
    /// `exec-exit ID STATUS`, `oom`, `delete STATUS` …
    #[track_caller]
    pub fn for_container(&self, container: &str) -> Vec<String> {
        // containerd sends events to each subscriber in order. Therefore all earlier events have arrived when the
        // marker event arrives.
        let marker = self.mark();
        let arrived = self.receive(Instant::now() + TIMEOUT, |topic| topic == marker);
        assert!(arrived, "containerd has not sent the marker event {marker}");
        self.seen_of(container)
    }

    /// Waits until a container has at least `count` events, and returns the container's events.
    #[track_caller]
    pub fn wait_for(&self, container: &str, count: usize) -> Vec<String> {
        let has_enough = || self.seen_of(container).len() >= count;
        let enough = has_enough() || self.receive(Instant::now() + TIMEOUT, |_| has_enough());
        let seen = self.seen_of(container);
        assert!(enough, "expected {count} events of {container}, received {seen:?}");
        seen
    }

    /// Returns the events of a container that have arrived so far. Also works if containerd has ended since
    /// [`Events::watch`].
    pub fn so_far(&self, container: &str) -> Vec<String> {
        self.receive(Instant::now(), |_| false);
        self.seen_of(container)
    }

    /// Returns the ids of all containers with an event so far.
    pub fn ids_so_far(&self) -> BTreeSet<String> {
        self.receive(Instant::now(), |_| false);
        self.seen.borrow().iter().map(|(id, _)| id.clone()).filter(|id| !id.is_empty()).collect()
    }

    fn seen_of(&self, container: &str) -> Vec<String> {
        let seen = self.seen.borrow();
        seen.iter().filter(|(of, _)| of == container).map(|(_, what)| what.clone()).collect()
    }

    /// Publishes a marker event: an event without content and with a unique topic. Returns the topic.
    #[track_caller]
    fn mark(&self) -> String {
        self.marker.set(self.marker.get() + 1);
        let topic = format!("/husk-e2e/marker-{}-{}", std::process::id(), self.marker.get());
        containerd::publish(KUBERNETES, &topic).unwrap_or_else(|status| panic!("failed to publish {topic}: {status}"));
        topic
    }

    /// Records arriving events until `enough` accepts the topic of an event. Returns false if `enough` accepts
    /// no topic before the deadline.
    fn receive(&self, deadline: Instant, enough: impl Fn(&str) -> bool) -> bool {
        while let Ok(bytes) = self.arriving.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            let envelope = Envelope::parse_from_bytes(&bytes).unwrap();
            self.seen.borrow_mut().extend(task(&envelope));
            if enough(&envelope.topic) {
                return true;
            }
        }
        false
    }
}

/// Returns the container id and a description of a task event, or `None` for any other event.
fn task(envelope: &Envelope) -> Option<(String, String)> {
    let value = &envelope.event.value;
    let what = envelope.topic.strip_prefix("/tasks/")?;
    Some(match what {
        "create" => (TaskCreate::parse_from_bytes(value).unwrap().container_id, what.to_owned()),
        "start" => (TaskStart::parse_from_bytes(value).unwrap().container_id, what.to_owned()),
        "oom" => (TaskOOM::parse_from_bytes(value).unwrap().container_id, what.to_owned()),
        "paused" => (TaskPaused::parse_from_bytes(value).unwrap().container_id, what.to_owned()),
        "resumed" => (TaskResumed::parse_from_bytes(value).unwrap().container_id, what.to_owned()),
        "exec-added" => {
            let event = TaskExecAdded::parse_from_bytes(value).unwrap();
            (event.container_id, format!("{what} {}", event.exec_id))
        }
        "exec-started" => {
            let event = TaskExecStarted::parse_from_bytes(value).unwrap();
            (event.container_id, format!("{what} {}", event.exec_id))
        }
        "exit" => {
            let event = TaskExit::parse_from_bytes(value).unwrap();
            let is_init = event.id == event.container_id;
            let what = if is_init {
                format!("exit {}", event.exit_status)
            } else {
                format!("exec-exit {} {}", event.id, event.exit_status)
            };
            (event.container_id, what)
        }
        "delete" => {
            let event = TaskDelete::parse_from_bytes(value).unwrap();
            (event.container_id, format!("{what} {}", event.exit_status))
        }
        _ => (String::new(), format!("unknown {what}")),
    })
}

/// Replaces exec ids in events by the numbers 1, 2 and so on, in the order of first appearance.
pub fn number_exec_ids(events: &[String]) -> Vec<String> {
    let mut ids: Vec<&str> = Vec::new();
    let mut all = Vec::new();
    for event in events {
        let words: Vec<&str> = event.split(' ').collect();
        match words.as_slice() {
            [what, id, rest @ ..] if what.starts_with("exec-") => {
                if !ids.contains(id) {
                    ids.push(id);
                }
                let number = ids.iter().position(|one| one == id).unwrap() + 1;
                all.push([&[*what, &number.to_string()], rest].concat().join(" "));
            }
            _ => all.push(event.clone()),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_ids_are_numbered() {
        let events = ["start", "exec-added b", "exec-added a", "exec-exit b 7", "exit 0"].map(str::to_owned);
        assert_eq!(number_exec_ids(&events), ["start", "exec-added 1", "exec-added 2", "exec-exit 1 7", "exit 0"]);
    }
}
