//! Checks the invariants that hold after every request, even if the request was interrupted.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_proto::containerd::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart,
};
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::topics::{
    TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC,
    TASK_EXIT_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
};
use protobuf::Message;
use tokio::time::Instant;
use ttrpc::{Code, Request};

use super::model::{BUDGET, Model};
use super::requests::{CONTAINER, Call, OTHER};
use crate::lock;

/// The shim may be this much later than its budget, because its own timeouts are rounded to whole milliseconds.
const SLACK: Duration = Duration::from_millis(500);

/// Makes a request through a client of its own. Fails if the answer does not arrive within `limit`. Returns the code of
/// the answer.
pub async fn ask(model: &Model, request: Request, limit: Duration) -> Code {
    let what = request.method.clone();
    let answer = tokio::time::timeout(limit + SLACK, model.connect().request(request)).await;
    match answer.unwrap_or_else(|_| panic!("{what} does not end within {limit:?}")) {
        Ok(_) => Code::OK,
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        Err(error) => panic!("{what} failed: {error}"),
    }
}

fn of(request: &Request, container: &str) -> Request {
    use husk_proto::containerd::api::{DeleteRequest, KillRequest, WaitRequest};
    let mut request = request.clone();
    let id = container.to_owned();
    request.payload = match request.method.as_str() {
        "Kill" => super::requests::bytes(&KillRequest { id, signal: 9, ..Default::default() }),
        "Delete" => super::requests::bytes(&DeleteRequest { id, ..Default::default() }),
        _ => super::requests::bytes(&WaitRequest { id, ..Default::default() }),
    };
    request
}

/// Ends everything as a client would. Checks that everything ends within its budget, and that nothing is left.
pub async fn conclude(model: &Model) {
    // No id outlives its request.
    for id in [CONTAINER, OTHER] {
        let taken = model.shim.containers.get(id).is_ok();
        assert!(taken || model.shim.containers.reserve(id).is_ok(), "the id {id} is still reserved");
    }
    for id in [CONTAINER, OTHER] {
        let Ok(container) = model.shim.containers.get(id) else { continue };
        if container.init.exit().is_none() {
            // SIGKILL implies an exit.
            let begin = Instant::now();
            let killed = ask(model, of(&Call::Kill.request(model), id), BUDGET).await;
            assert!(matches!(killed, Code::OK | Code::NOT_FOUND), "Kill failed: {killed:?}");
            let rest = BUDGET.saturating_sub(begin.elapsed());
            assert_eq!(ask(model, of(&Call::Wait.request(model), id), rest).await, Code::OK);
        }
        let execs: Vec<_> = container.processes().into_iter().filter(|process| !process.exec.is_empty()).collect();
        let mut deleted = ask(model, of(&Call::Delete.request(model), id), BUDGET).await;
        if deleted == Code::INTERNAL {
            // The agent has failed. The client's second attempt must succeed.
            deleted = ask(model, of(&Call::Delete.request(model), id), BUDGET).await;
        }
        if deleted == Code::NOT_FOUND {
            // Another client deletes the container.
            tokio::time::sleep(BUDGET).await;
            assert!(model.shim.containers.get(id).is_err(), "container {id} is not deleted");
        } else {
            assert_eq!(deleted, Code::OK, "Delete failed");
        }
        for exec in execs {
            let exit = tokio::time::timeout(SLACK, exec.wait()).await;
            let created = exec.state() == crate::container::process::State::Created;
            assert!(exit.is_ok() || created, "exec {} has no exit after the deletion of its container", exec.exec);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        if !model.shim.sandbox.is_dead() && !*model.frozen.borrow() && model.script.honest.load(Ordering::Relaxed) {
            let left: Vec<_> = model.script.known().into_iter().filter(|(container, _)| container == id).collect();
            assert!(left.is_empty(), "the guest still has {left:?}");
        }
    }
    if !model.shim.sandbox.is_dead() && !model.host.failed.load(Ordering::Relaxed) {
        assert!(model.host.vcpus.load(Ordering::Relaxed) <= 1, "the vCPUs of deleted containers stay");
        assert_eq!(model.host.pids.load(Ordering::Relaxed), 0, "PIDs are not released");
    }
    let end = if model.shim.sandbox_state.is_created() { Call::ShutdownSandbox } else { Call::Shutdown };
    assert_eq!(ask(model, end.request(model), BUDGET).await, Code::OK);
    let finished = tokio::time::timeout(SLACK, model.shim.wait_finished()).await;
    assert!(finished.is_ok(), "Shutdown has not finished the shim");
    model.containerd_down.store(false, Ordering::Relaxed);
    model.shim.events().flush(Duration::from_secs(10)).await;
    let events = lock(&model.events);
    check_events(&events);
}

/// A step in the life of a process, as its events report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Create,
    Start,
    Exit,
    Delete,
}

/// Returns the container, the exec and the step of an event.
fn step(event: &Envelope) -> Option<(String, String, Step)> {
    fn decode<M: Message>(event: &Envelope) -> M {
        M::parse_from_bytes(&event.event.value).unwrap()
    }
    let none = String::new();
    Some(match event.topic.as_str() {
        TASK_CREATE_EVENT_TOPIC => (decode::<TaskCreate>(event).container_id, none, Step::Create),
        TASK_START_EVENT_TOPIC => (decode::<TaskStart>(event).container_id, none, Step::Start),
        TASK_DELETE_EVENT_TOPIC => (decode::<TaskDelete>(event).container_id, none, Step::Delete),
        TASK_EXIT_EVENT_TOPIC => {
            let exit = decode::<TaskExit>(event);
            let exec = if exit.id == exit.container_id { none } else { exit.id };
            (exit.container_id, exec, Step::Exit)
        }
        TASK_EXEC_ADDED_EVENT_TOPIC => {
            let added = decode::<TaskExecAdded>(event);
            (added.container_id, added.exec_id, Step::Create)
        }
        TASK_EXEC_STARTED_EVENT_TOPIC => {
            let started = decode::<TaskExecStarted>(event);
            (started.container_id, started.exec_id, Step::Start)
        }
        _ => return None,
    })
}

/// Checks that each step of a process is published once and in order, and that a process that was started also exits.
pub fn check_events(events: &[Envelope]) {
    let steps: Vec<_> = events.iter().filter_map(step).collect();
    let mut seen = BTreeMap::<_, Vec<Step>>::new();
    for (container, exec, step) in steps.iter().cloned() {
        let all = seen.entry((container.clone(), exec.clone())).or_default();
        // An id can be used again after the deletion of its container.
        if step == Step::Create && all.last().is_none_or(|last| *last == Step::Delete || !exec.is_empty()) {
            all.clear();
        }
        assert!(all.last().is_none_or(|last| *last < step), "{step:?} of {container}/{exec} is wrong in {steps:?}");
        all.push(step);
        if step == Step::Delete {
            for ((of, exec), all) in &seen {
                let running = all.contains(&Step::Start) && !all.contains(&Step::Exit);
                assert!(*of != container || !running, "{of}/{exec} was deleted without an exit in {steps:?}");
            }
        }
    }
    for ((container, exec), all) in seen {
        let complete = !all.contains(&Step::Start) || all.contains(&Step::Exit);
        assert!(complete, "{container}/{exec} was started and never exited in {steps:?}");
    }
}
