//! Every request, in every state of the pod, with a fault at every step of the request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::MessageHeader;

use super::check::{ask, conclude};
use super::model::{BUDGET, Model};
use super::process::{Scenarios, in_own_process};
use super::requests::{ALL, CONTAINER, Call, OTHER};
use crate::vm::agent::timeouts;

/// No request has more steps.
const MAX_STEPS: usize = 100;

/// The state of the pod when the request arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Booting,
    Booted,
    Created,
    Running,
    ExecAdded,
    ExecRunning,
    Paused,
    Stopped,
    Dead,
}

/// What happens at a step of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The client drops its request.
    ClientDrops,
    /// The client closes its connection.
    ClientCloses,
    /// The server drops the handler of the request, as ttrpc does at the request's timeout.
    ServerDrops,
    /// The VMM process ends.
    Crash,
    /// The agent stops answering.
    Hang,
    /// The guest stops reading.
    Freeze,
    /// The container exits.
    Exit,
    /// Another client kills the container.
    Kill,
    /// Another client deletes the container.
    Delete,
    /// Another client shuts the shim down.
    Shutdown,
}

type Work = Pin<Box<dyn Future<Output = ttrpc::Result<()>> + Send>>;

/// A future that calls `fault` before its poll number `at`. If `drops` is true, the future then ends without a result.
struct Interrupted {
    inner: Work,
    at: usize,
    polls: Arc<AtomicUsize>,
    drops: bool,
    fault: Option<Box<dyn FnOnce() + Send>>,
}

impl Future for Interrupted {
    type Output = Option<ttrpc::Result<()>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls.fetch_add(1, Ordering::Relaxed) == self.at {
            if let Some(fault) = self.fault.take() {
                fault();
            }
            if self.drops {
                return Poll::Ready(None);
            }
        }
        self.inner.as_mut().poll(context).map(Some)
    }
}

async fn prepare(before: Before) -> Model {
    let mut model = Model::boot(true).await;
    model.mount_share();
    if before == Before::Booting {
        return model;
    }
    model.finish_boot().await;
    if before == Before::Booted {
        return model;
    }
    // The other container only has to exist.
    model.add(OTHER);
    let mut calls = vec![Call::Create.request(&model)];
    let after: &[Call] = match before {
        Before::Booting | Before::Booted | Before::Created => &[],
        Before::Running | Before::Stopped | Before::Dead => &[Call::Start],
        Before::ExecAdded => &[Call::Start, Call::Exec],
        Before::ExecRunning => &[Call::Start, Call::Exec, Call::StartExec],
        Before::Paused => &[Call::Start, Call::Pause],
    };
    calls.extend(after.iter().map(|call| call.request(&model)));
    for request in calls {
        let method = request.method.clone();
        assert_eq!(ask(&model, request, BUDGET).await, Code::OK, "{method}");
    }
    match before {
        Before::Stopped => model.script.exit(CONTAINER, 3),
        Before::Dead => model.crash.notify_one(),
        _ => {}
    }
    if matches!(before, Before::Stopped | Before::Dead) {
        assert_eq!(ask(&model, Call::Wait.request(&model), BUDGET).await, Code::OK);
    }
    model
}

/// Returns the fault of `model`, which happens at once.
fn fault(model: &Model, fault: Fault) -> Box<dyn FnOnce() + Send> {
    let other = |call: Call| -> Box<dyn FnOnce() + Send> {
        let (client, request) = (model.connect(), call.request(model));
        Box::new(move || drop(tokio::spawn(async move { client.request(request).await })))
    };
    match fault {
        Fault::ClientDrops | Fault::ClientCloses | Fault::ServerDrops => Box::new(|| ()),
        Fault::Crash => {
            let crash = Arc::clone(&model.crash);
            Box::new(move || crash.notify_one())
        }
        Fault::Hang => {
            let script = Arc::clone(&model.script);
            Box::new(move || script.hang("*"))
        }
        Fault::Freeze => {
            let frozen = model.frozen.clone();
            Box::new(move || frozen.send_modify(|frozen| *frozen = true))
        }
        Fault::Exit => {
            let script = Arc::clone(&model.script);
            Box::new(move || script.exit_running(CONTAINER, 5))
        }
        Fault::Kill => other(Call::Kill),
        Fault::Delete => other(Call::Delete),
        Fault::Shutdown => other(Call::Shutdown),
    }
}

/// The limit of a request. A request that creates or starts something waits for the guest.
fn limit(call: Call) -> Duration {
    match call {
        Call::Create | Call::Start | Call::StartExec | Call::Update | Call::StartSandbox => timeouts::SLOW * 2,
        // The drain of an exec's output is as long as with runc's shim.
        Call::Pause | Call::Resume | Call::Resize | Call::DeleteExec => timeouts::QUICK + Duration::from_secs(3),
        Call::State | Call::Connect | Call::SandboxStatus | Call::Platform => Duration::from_secs(1),
        _ => BUDGET,
    }
}

/// Makes the request and interrupts it. Returns whether it was interrupted before its end.
async fn run(before: Before, call: Call, kind: Fault, at: usize) -> bool {
    let mut model = prepare(before).await;
    let (request, fault) = (call.request(&model), fault(&model, kind));
    let polls = Arc::<AtomicUsize>::default();
    let drops = matches!(kind, Fault::ClientDrops | Fault::ClientCloses | Fault::ServerDrops);
    let counted = Arc::clone(&polls);
    let interrupted = |inner: Work| Interrupted { inner, at, polls: counted, drops, fault: Some(fault) };
    let client = model.connect();
    let work: tokio::task::JoinHandle<()> = if matches!(kind, Fault::ClientDrops | Fault::ClientCloses) {
        let closes = kind == Fault::ClientCloses;
        let mut connection = Some(client.clone());
        let work = interrupted(Box::pin(async move { client.request(request).await.map(drop) }));
        tokio::spawn(async move {
            work.await;
            if closes {
                connection.take();
            }
            // The connection of a client that only drops its request stays open.
            tokio::time::sleep(Duration::from_secs(1)).await;
        })
    } else {
        let all = if drops { crate::service::services(&model.shim) } else { crate::service::uncompleted(&model.shim) };
        let context = TtrpcContext {
            mh: MessageHeader::default(),
            metadata: Default::default(),
            timeout_nano: 0,
            connection_data: Default::default(),
        };
        let work = interrupted(Box::pin(async move {
            let method = all.get(&request.service).and_then(|service| service.methods.get(&request.method)).unwrap();
            method.handler(context, request).await.map(drop)
        }));
        tokio::spawn(async move { drop(work.await) })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    model.finish_boot_if_alive().await;
    let mut work = work;
    if !call.is_wait() {
        let ended = tokio::time::timeout(limit(call), &mut work).await;
        assert!(ended.is_ok(), "the request does not end within {:?}", limit(call));
        ended.unwrap().unwrap();
    }
    // The work that continues without the client ends within its budget, and so do the requests of other clients.
    tokio::time::sleep(limit(call)).await;
    conclude(&model).await;
    if call.is_wait() {
        let ended = tokio::time::timeout(Duration::from_secs(2), work).await;
        assert!(ended.is_ok(), "the wait does not end with its process");
    }
    model.end().await;
    polls.load(Ordering::Relaxed) > at
}

fn exhaust(states: &[Before], calls: &[Call], faults: &[Fault]) {
    let mut scenarios = Scenarios::default();
    for before in states {
        for call in calls {
            for fault in faults {
                let interrupted = |at: usize, scenarios: &mut Scenarios| {
                    let name = format!("{call:?} in the state {before:?}, {fault:?} at step {at}");
                    scenarios.run(name, run(*before, *call, *fault, at)) == Some(true)
                };
                let last = (0..MAX_STEPS).find(|&at| !interrupted(at, &mut scenarios));
                assert!(last.is_some(), "{call:?} has more than {MAX_STEPS} steps");
            }
        }
    }
    scenarios.end();
}

const STATES: [Before; 9] = [
    Before::Booting,
    Before::Booted,
    Before::Created,
    Before::Running,
    Before::ExecAdded,
    Before::ExecRunning,
    Before::Paused,
    Before::Stopped,
    Before::Dead,
];

#[test]
fn dropped_requests_leave_nothing_half_done() {
    in_own_process(|| exhaust(&STATES, &ALL, &[Fault::ClientDrops, Fault::ClientCloses, Fault::ServerDrops]));
}

/// The requests that depend on the guest, or that change something.
fn lasting() -> Vec<Call> {
    let at_once = [
        Call::Checkpoint,
        Call::CloseIo,
        Call::State,
        Call::Connect,
        Call::SandboxStatus,
        Call::PingSandbox,
        Call::Platform,
        Call::SandboxMetrics,
    ];
    ALL.into_iter().filter(|call| !at_once.contains(call)).collect()
}

#[test]
fn faults_of_the_guest_at_every_step_leave_nothing_half_done() {
    in_own_process(|| exhaust(&STATES, &lasting(), &[Fault::Crash, Fault::Hang, Fault::Freeze]));
}

#[test]
fn other_clients_at_every_step_leave_nothing_half_done() {
    in_own_process(|| exhaust(&STATES, &lasting(), &[Fault::Exit, Fault::Kill, Fault::Delete, Fault::Shutdown]));
}
