//! Tests of the pod's orderly end after a signal to the shim or to the VMM.

use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_proto::annotations::{CONTAINER_TYPE, STOP_SIGNAL};
use husk_proto::containerd::api::{CreateTaskRequest, ShutdownRequest, StartRequest};
use husk_proto::containerd::sandbox_api::StopSandboxRequest;
use husk_vmm::control::Notice;
use protobuf::Message;
use tokio::time::Instant;

use super::model_tests::{Answer, BUDGET, LAST_EXEC, Model, SANDBOX, start_more_execs_than_turns, within};
use super::*;
use crate::lock;

/// The limit until the shim kills the VM. The VMM waits longer for the shim.
const END_LIMIT: Duration = Duration::from_secs(50);
/// The limit until the pod's resources are removed. systemd waits longer before it sends SIGKILL.
const LIMIT: Duration = Duration::from_secs(65);

fn log(model: &Model) -> Vec<String> {
    lock(&model.script.log).clone()
}

fn exits(model: &Model) -> usize {
    model.count(TASK_EXIT_EVENT_TOPIC)
}

#[tokio::test(start_paused = true)]
async fn containers_are_stopped_then_killed_then_disks_are_flushed_and_the_vm_ends() {
    let model = Model::start(true).await;
    model.shim.sandbox.pretend_disk();
    model.run("a").await;
    model.add("created");
    let stubborn = model.add_with("stubborn", &[(STOP_SIGNAL, "SIGQUIT")]);
    let pause = model.add_with("pause", &[(CONTAINER_TYPE, "sandbox")]);
    for id in ["stubborn", "pause"] {
        let request = StartRequest { id: id.to_owned(), ..Default::default() };
        model.client().start(within(LIMIT), &request).await.unwrap();
    }
    lock(&model.script.ignored).insert(3);
    let begin = Instant::now();
    model.shim.end_orderly().await;
    assert!((Duration::from_secs(10)..Duration::from_secs(11)).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    assert_eq!((model.wait("a").await, stubborn.init.wait().await.status), (143, 137));
    assert_eq!((pause.init.wait().await.status, model.wait("created").await), (0, 137));
    let mut log = log(&model);
    // The signals to several containers have no order.
    log[..2].sort();
    assert_eq!(log, ["a gets 15", "stubborn gets 3", "stubborn gets 9", "sync", "the VMM ends"]);
    model.shim.finish().await;
    assert_eq!(exits(&model), 4);
    assert!(model.reason().contains("received SIGTERM or SIGINT"), "{}", model.reason());
}

#[tokio::test(start_paused = true)]
async fn end_is_at_once_if_the_containers_exit_and_their_statuses_are_reported() {
    let model = Model::start(true).await;
    let paused = model.run("paused").await;
    paused.set_paused(true);
    let begin = Instant::now();
    model.shim.end_orderly().await;
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(log(&model)[..2], ["paused is resumed", "paused gets 15"]);
    assert_eq!(paused.init.wait().await.status, 128 + 15);
}

#[tokio::test(start_paused = true)]
async fn end_has_a_limit_if_the_guest_hangs_and_the_vmm_does_not_exit() {
    for (hung, mortal) in [("*", true), ("*", false), ("sync", true)] {
        let model = Model::start(mortal).await;
        model.shim.sandbox.pretend_disk();
        model.run("a").await;
        model.script.hang(hung);
        let begin = Instant::now();
        model.shim.end_orderly().await;
        assert!(begin.elapsed() < END_LIMIT, "{hung}, {mortal}: {:?}", begin.elapsed());
        model.shim.finish().await;
        assert!(begin.elapsed() < LIMIT, "{hung}, {mortal}: {:?}", begin.elapsed());
        assert_eq!(model.wait("a").await, if hung == "*" { 137 } else { 143 });
        assert_eq!(exits(&model), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_starts_while_the_pod_ends() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.add("b");
    lock(&model.script.ignored).insert(15);
    let ending = tokio::spawn({
        let shim = Arc::clone(&model.shim);
        async move { shim.end_orderly().await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let start = StartRequest { id: "b".to_owned(), ..Default::default() };
    let create = CreateTaskRequest { id: "c".to_owned(), ..Default::default() };
    let refused = [
        model.client().start(within(LIMIT), &start).await.unwrap_err(),
        model.client().create(within(LIMIT), &create).await.map(drop).unwrap_err(),
    ];
    for error in refused {
        let error = error.to_string();
        assert!(error.contains("the pod is ending"), "{error}");
    }
    ending.await.unwrap();
    assert_eq!(model.wait("a").await, 137);
}

#[tokio::test(start_paused = true)]
async fn notice_of_the_vmm_ends_the_wait_for_a_signal() {
    let model = Model::start(true).await;
    let limit = Duration::from_secs(1);
    assert!(tokio::time::timeout(limit, model.shim.vmm_terminated()).await.is_err());
    model.notices.upgrade().unwrap().send(Notice::Terminated).await.unwrap();
    tokio::time::timeout(limit, model.shim.vmm_terminated()).await.unwrap();
}

/// Begins the orderly end, and waits until the containers have got their stop signals.
async fn begin_end(model: &Model) -> tokio::task::JoinHandle<()> {
    let shim = Arc::clone(&model.shim);
    let ending = tokio::spawn(async move { shim.end_orderly().await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    ending
}

/// Checks that the disks were flushed before the VM ended.
fn assert_flushed(model: &Model, what: &str) {
    let log = log(model);
    assert!(log.ends_with(&["sync".to_owned(), "the VMM ends".to_owned()]), "{what}: {log:?}");
}

#[tokio::test(start_paused = true)]
async fn kill_of_the_sandbox_container_does_not_cut_the_end() {
    let model = Model::start(true).await;
    model.shim.sandbox.pretend_disk();
    model.run("a").await;
    let pause = model.add_with("pause", &[(CONTAINER_TYPE, "sandbox")]);
    let start = StartRequest { id: "pause".to_owned(), ..Default::default() };
    model.client().start(within(LIMIT), &start).await.unwrap();
    lock(&model.script.ignored).insert(15);
    let ending = begin_end(&model).await;
    let begin = Instant::now();
    model.kill("pause", libc::SIGKILL).await.unwrap();
    assert!(begin.elapsed() <= BUDGET, "{:?}", begin.elapsed());
    ending.await.unwrap();
    assert_flushed(&model, "Kill");
    // The pod ends in an orderly way, whatever a client asks for.
    assert_eq!(pause.init.wait().await.status, 0);
}

#[tokio::test(start_paused = true)]
async fn delete_of_the_last_container_does_not_cut_the_end() {
    for annotations in [&[(CONTAINER_TYPE, "sandbox")][..], &[]] {
        let model = Model::start(true).await;
        model.shim.sandbox.pretend_disk();
        model.script.set("sync", Answer::Late(Duration::from_secs(20)));
        model.add_with("last", annotations);
        let ending = begin_end(&model).await;
        let begin = Instant::now();
        model.delete("last").await.unwrap();
        assert!(begin.elapsed() <= BUDGET, "{:?}", begin.elapsed());
        ending.await.unwrap();
        assert_flushed(&model, "Delete");
    }
}

#[tokio::test(start_paused = true)]
async fn shutdown_and_stop_sandbox_do_not_cut_the_end() {
    for sandbox_api in [false, true] {
        let model = Model::start(true).await;
        model.shim.sandbox.pretend_disk();
        model.script.set("sync", Answer::Late(Duration::from_secs(20)));
        let ending = begin_end(&model).await;
        let begin = Instant::now();
        if sandbox_api {
            let stop = StopSandboxRequest { sandbox_id: SANDBOX.to_owned(), ..Default::default() };
            let request = ttrpc::Request {
                service: "containerd.runtime.sandbox.v1.Sandbox".to_owned(),
                method: "StopSandbox".to_owned(),
                payload: stop.write_to_bytes().unwrap(),
                ..Default::default()
            };
            model.connect().request(request).await.unwrap();
        } else {
            let request = ShutdownRequest { id: SANDBOX.to_owned(), ..Default::default() };
            model.client().shutdown(within(BUDGET), &request).await.unwrap();
        }
        assert!(begin.elapsed() <= BUDGET, "{:?}", begin.elapsed());
        ending.await.unwrap();
        assert_flushed(&model, "Shutdown");
        model.shim.finish().await;
    }
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_sigkill_do_not_cut_the_end() {
    // Another client has sent SIGKILL before the signal. The container does not exit, or the agent does not answer.
    for agent_hangs in [false, true] {
        let model = Model::start(true).await;
        model.shim.sandbox.pretend_disk();
        model.run("a").await;
        model.script.immortal.store(true, Ordering::Relaxed);
        if agent_hangs {
            model.script.hang("kill");
        } else {
            model.kill("a", libc::SIGKILL).await.unwrap();
        }
        let ending = begin_end(&model).await;
        ending.await.unwrap();
        assert_flushed(&model, "SIGKILL");
    }
}

#[tokio::test(start_paused = true)]
async fn stop_signal_waits_for_the_start_of_its_container() {
    let model = Model::start(true).await;
    model.add("a");
    model.script.set("start", Answer::Late(Duration::from_secs(3)));
    let client = model.client();
    let starting = tokio::spawn(async move {
        let start = StartRequest { id: "a".to_owned(), ..Default::default() };
        client.start(within(LIMIT), &start).await
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Before its start, the container's program has no handler for the signal, and the kernel drops the signal.
    let begin = Instant::now();
    model.shim.end_orderly().await;
    starting.await.unwrap().unwrap();
    assert_eq!((log(&model)[0].as_str(), model.wait("a").await), ("a gets 15", 143));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn exec_that_waits_for_its_turn_does_not_start_while_the_pod_ends() {
    let model = Model::start(true).await;
    model.run("a").await;
    let waiting = start_more_execs_than_turns(&model).await;
    lock(&model.script.ignored).insert(15);
    let ending = begin_end(&model).await;
    model.script.recover();
    let error = waiting.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the pod is ending"), "{error}");
    assert!(!model.script.known().contains(&("a".to_owned(), LAST_EXEC.to_owned())));
    ending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn shim_serves_requests_until_the_containers_are_deleted() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.shim.end_orderly().await;
    let begin = Instant::now();
    let shim = std::sync::Arc::clone(&model.shim);
    let last = tokio::spawn(async move { shim.wait_last_requests().await });
    assert_eq!(model.delete("a").await.unwrap().exit_status, 143);
    assert!(!last.is_finished());
    model.client().shutdown(within(BUDGET), &ShutdownRequest::default()).await.unwrap();
    last.await.unwrap();
    assert!(begin.elapsed() < orderly_end::LAST_REQUESTS_TIMEOUT, "{:?}", begin.elapsed());

    let model = Model::start(true).await;
    model.run("a").await;
    model.shim.end_orderly().await;
    let begin = Instant::now();
    model.shim.wait_last_requests().await;
    assert!(begin.elapsed() >= orderly_end::LAST_REQUESTS_TIMEOUT, "{:?}", begin.elapsed());
}
