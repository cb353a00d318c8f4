//! Tests of SIGKILL for an exec whose start is in progress. Such a start can hang, for example because the container is
//! frozen. containerd sends SIGKILL if an exec exceeds its timeout, and then waits for the exit.

use std::time::Duration;

use husk_proto::containerd::api::{DeleteRequest, Empty, KillRequest, WaitRequest};
use husk_proto::containerd::topics::{TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC};

use crate::container::model_tests::{
    Answer, BUDGET, LAST_EXEC, Model, begin_exec, start_more_execs_than_turns, within,
};

async fn kill(model: &Model, exec_id: &str) -> ttrpc::Result<Empty> {
    let (id, exec_id, signal) = ("a".to_owned(), exec_id.to_owned(), libc::SIGKILL.unsigned_abs());
    model.client().kill(within(BUDGET), &KillRequest { id, exec_id, signal, ..Default::default() }).await
}

/// Checks that an exec has ended because of SIGKILL, and deletes it as containerd does.
async fn expect_killed(model: &Model, exec_id: &str) {
    let (id, exec_id) = ("a".to_owned(), exec_id.to_owned());
    let wait = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
    assert_eq!(model.client().wait(within(BUDGET), &wait).await.unwrap().exit_status, 137);
    let delete = DeleteRequest { id, exec_id, ..Default::default() };
    assert_eq!(model.client().delete(within(BUDGET), &delete).await.unwrap().exit_status, 137);
    assert_eq!((model.count(TASK_EXEC_STARTED_EVENT_TOPIC), model.count(TASK_EXIT_EVENT_TOPIC)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_an_exec_that_waits_for_its_turn() {
    let model = Model::start(true).await;
    model.run("a").await;
    let waiting = start_more_execs_than_turns(&model).await;
    kill(&model, LAST_EXEC).await.unwrap();
    let error = waiting.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the process was killed while it was being started"), "{error}");
    expect_killed(&model, LAST_EXEC).await;
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_an_exec_that_the_agent_does_not_know_yet() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.set("exec", Answer::Late(Duration::from_secs(1)));
    let started = begin_exec(&model, "e").await;
    kill(&model, "e").await.unwrap();
    started.await.unwrap().unwrap_err();
    assert!(!model.script.known().contains(&("a".to_owned(), "e".to_owned())), "the guest still has the exec");
    expect_killed(&model, "e").await;
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_an_exec_that_the_agent_is_starting() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.set("start_exec", Answer::Late(Duration::from_secs(1)));
    let started = begin_exec(&model, "e").await;
    kill(&model, "e").await.unwrap();
    started.await.unwrap().unwrap_err();
    expect_killed(&model, "e").await;
}
