//! Records containerd's task events of each container, in order of arrival.

use std::cell::RefCell;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;

use crate::command::{Input, Running};
use crate::cri::{SOCKET, grpc};
use crate::{KUBERNETES, node};

/// A subscription to containerd's events, and the task events received so far.
pub struct Events {
    arriving: Receiver<Vec<u8>>,
    /// Container id and event.
    seen: RefCell<Vec<(String, String)>>,
}

impl Events {
    /// Subscribes. All events after the return are recorded.
    #[track_caller]
    pub fn watch() -> Self {
        let arriving = grpc::stream(SOCKET, "/containerd.services.events.v1.Events/Subscribe", Vec::new());
        let events = Self { arriving, seen: RefCell::default() };
        events.catch_up();
        events
    }

    /// Returns the events of a container: `create`, `start`, `exec-added ID`, `exec-started ID`, `exit STATUS`,
    /// `exec-exit ID STATUS`, `oom`, `delete STATUS` …
    pub fn for_container(&self, container: &str) -> Vec<String> {
        self.catch_up();
        let seen = self.seen.borrow();
        seen.iter().filter(|(of, _)| of == container).map(|(_, what)| what.clone()).collect()
    }

    /// Waits until a container has at least `count` events.
    #[track_caller]
    pub fn wait_for(&self, container: &str, count: usize) -> Vec<String> {
        let enough = || Some(self.for_container(container)).filter(|seen| seen.len() >= count);
        node::eventually(Duration::from_secs(30), enough)
            .unwrap_or_else(|| panic!("expected {count} events, received {:?}", self.for_container(container)))
    }

    /// Receives all events sent so far. It triggers an event and waits for it: containerd sends events to each
    /// subscriber in order, so all earlier events have then arrived.
    #[track_caller]
    fn catch_up(&self) {
        let marker = node::eventually(Duration::from_secs(30), || {
            let mut label = Command::new("ctr");
            label.args(["namespaces", "label", KUBERNETES, "husk-e2e=seen"]);
            Running::start(label, Input::Null).wait().expect_code(0);
            // The first event may be sent before the server has registered the subscription.
            while let Ok(bytes) = self.arriving.recv_timeout(Duration::from_secs(1)) {
                let envelope = Envelope::parse_from_bytes(&bytes).unwrap();
                if envelope.topic == "/namespaces/update" {
                    return Some(());
                }
                self.seen.borrow_mut().extend(task(&envelope));
            }
            None
        });
        assert!(marker.is_some(), "containerd sends no events");
    }
}

/// Returns the container id and a description of a task event.
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

/// Replaces exec ids in events by numbers from 1, in order of first appearance.
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
