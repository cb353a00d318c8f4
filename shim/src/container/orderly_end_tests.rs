//! Tests of the pod's orderly end after a signal to the shim or to the VMM.

use std::time::Duration;

use husk_proto::annotations::{CONTAINER_TYPE, STOP_SIGNAL};
use husk_proto::containerd::api::{CreateTaskRequest, StartRequest};
use husk_vmm::control::Notice;
use tokio::time::Instant;

use super::model_tests::{Model, within};
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
