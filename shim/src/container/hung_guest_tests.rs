//! Tests of requests while the guest or the VMM hangs, and of requests whose caller disconnects or whose timeout
//! expires.
//!
//! The shim, its services and its clients are the real ones. The agent and the VMM process are scripted. The clock is
//! tokio's paused clock, so that timeouts take no time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_config::TimeoutFactor;
use husk_proto::containerd::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PidsRequest, ShutdownRequest, StartRequest,
    StatsRequest, Status,
};
use husk_proto::containerd::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use protobuf::well_known_types::any::Any;
use tokio::time::Instant;

use crate::container::escalation::{KILL_ANSWER_TIMEOUT, KILL_EXIT_TIMEOUT, SIGNAL_TIMEOUT};
use crate::container::model_tests::{Answer, BUDGET, Model, create, start_more_execs_than_turns, within};
use crate::sandbox::boot::log_vcpus;
use crate::sandbox::end::OOM_KILLED;
use crate::vm::agent::timeouts;
use crate::vm::vmm::{INSPECT_TIMEOUT, VMM_EXIT_TIMEOUT};

/// The factor of the model.
const HARDWARE: TimeoutFactor = TimeoutFactor(1);
/// The shim may be this much later.
const SLACK: Duration = Duration::from_millis(500);

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_agent_does_not_answer() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("b").await;
    model.script.hang("*");
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert!(begin.elapsed() < HARDWARE.of(KILL_ANSWER_TIMEOUT) + SLACK, "{:?}", begin.elapsed());
    assert_eq!((model.wait("a").await, model.wait("b").await), (137, 137));
    assert_eq!(model.reason(), "the agent did not kill container a within 2 s");
    assert_eq!(model.status("a").await, Status::STOPPED);
    for id in ["a", "b"] {
        assert_eq!(model.delete(id).await.unwrap().exit_status, 137);
    }
    assert!(begin.elapsed() < BUDGET);
    assert_eq!(model.count(TASK_EXIT_EVENT_TOPIC), 2);
}

#[tokio::test(start_paused = true)]
async fn running_containers_report_an_oom_kill_of_the_vmm() {
    for (kills, reason, oom_events) in [(0, "the VMM process ended with signal: 9 (SIGKILL)", 0), (1, OOM_KILLED, 1)] {
        let model = Model::start(true).await;
        model.run("running").await;
        model.add("created");
        std::fs::write(model.dir.path().join("memory.events"), format!("oom 1\noom_kill {kills}\n")).unwrap();
        model.vmm.kill();
        assert_eq!(model.wait("running").await, 137);
        assert!(model.reason().starts_with(reason), "{}", model.reason());
        assert_eq!(model.count(TASK_OOM_EVENT_TOPIC), oom_events);
    }
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_container_does_not_exit() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.immortal.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(model.wait("a").await, 137);
    assert!(begin.elapsed() < HARDWARE.of(KILL_EXIT_TIMEOUT) + SLACK, "{:?}", begin.elapsed());
    assert_eq!(model.reason(), "container a did not exit within 4 s after SIGKILL");
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_agent_answers_with_an_error() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.set("kill", Answer::Error);
    assert!(model.kill("a", libc::SIGTERM).await.is_err());
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(model.wait("a").await, 137);
    assert_eq!(model.reason(), "container a did not exit within 4 s after SIGKILL");
}

#[tokio::test(start_paused = true)]
async fn container_that_exits_after_sigkill_does_not_end_the_pod() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("b").await;
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(model.wait("a").await, 137);
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    tokio::time::sleep(HARDWARE.of(KILL_EXIT_TIMEOUT) * 2).await;
    assert_eq!((model.reason(), model.status("b").await), (String::new(), Status::RUNNING));
}

#[tokio::test(start_paused = true)]
async fn other_signals_succeed_and_end_nothing_while_the_agent_hangs() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.hang("kill");
    let begin = Instant::now();
    // A client that gets an error for SIGTERM never sends SIGKILL.
    model.kill("a", libc::SIGTERM).await.unwrap();
    assert!(begin.elapsed() < HARDWARE.of(SIGNAL_TIMEOUT) + SLACK, "{:?}", begin.elapsed());
    tokio::time::sleep(BUDGET).await;
    assert_eq!((model.reason(), model.status("a").await), (String::new(), Status::RUNNING));
    // The agent gets the signal when it continues.
    model.script.recover();
    assert_eq!(model.wait("a").await, 128 + 15);
}

#[tokio::test(start_paused = true)]
async fn delete_ends_the_pod_if_the_agent_does_not_answer() {
    for created_only in [false, true] {
        let model = Model::start(true).await;
        model.run("other").await;
        if created_only {
            model.add("a");
        } else {
            model.run("a").await;
            model.script.exit("a", 3);
            assert_eq!(model.wait("a").await, 3);
        }
        model.script.hang("delete");
        let begin = Instant::now();
        let status = if created_only { 137 } else { 3 };
        assert_eq!(model.delete("a").await.unwrap().exit_status, status);
        assert!(begin.elapsed() < BUDGET);
        assert_eq!(model.reason(), "the agent did not delete container a within 5 s");
        assert_eq!(model.wait("other").await, 137);
    }
}

#[tokio::test(start_paused = true)]
async fn containers_end_although_the_vmm_process_does_not_exit() {
    let model = Model::start(false).await;
    model.run("a").await;
    model.script.hang("*");
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    // The request ends only when the container counts as exited, and the time for the exit does not begin anew.
    let limit = HARDWARE.of(KILL_ANSWER_TIMEOUT) + HARDWARE.of(VMM_EXIT_TIMEOUT) + SLACK;
    assert!(begin.elapsed() < limit, "{:?}", begin.elapsed());
    assert_eq!(model.status("a").await, Status::STOPPED);
    assert_eq!(model.wait("a").await, 137);
    assert!(model.reason().contains("the VMM process did not exit within 1 s after SIGKILL"), "{}", model.reason());
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    let request = ShutdownRequest { id: "a".to_owned(), ..Default::default() };
    model.client().shutdown(within(BUDGET), &request).await.unwrap();
    assert!(begin.elapsed() < BUDGET + HARDWARE.of(VMM_EXIT_TIMEOUT), "{:?}", begin.elapsed());
    model.process.abort();
}

#[tokio::test(start_paused = true)]
async fn pids_answers_within_its_limit_while_the_agent_hangs() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.hang("*");
    let begin = Instant::now();
    let request = PidsRequest { id: "a".to_owned(), ..Default::default() };
    let pids = model.client().pids(within(BUDGET), &request).await.unwrap();
    // The scripted VMM has this PID, and a container without a PID of its own has the VMM's PID.
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [u32::MAX]);
    assert!(begin.elapsed() < timeouts::QUERY + Duration::from_millis(500), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn stats_fail_at_once_after_two_misses_until_the_agent_answers() {
    let model = Model::start(true).await;
    model.run("a").await;
    let request = StatsRequest { id: "a".to_owned(), ..Default::default() };
    let stats = async || {
        let begin = Instant::now();
        let result = model.client().stats(within(BUDGET), &request).await;
        (result.is_ok(), begin.elapsed())
    };
    assert!(stats().await.0);
    model.script.hang("*");
    for _ in 0..2 {
        let (answered, elapsed) = stats().await;
        assert!(!answered && elapsed < timeouts::QUERY + Duration::from_millis(500), "{elapsed:?}");
    }
    let (answered, elapsed) = stats().await;
    assert!(!answered && elapsed < Duration::from_millis(100), "{elapsed:?}");
    model.script.recover();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(stats().await.0);
}

#[tokio::test(start_paused = true)]
async fn start_completes_although_its_caller_disconnects() {
    let model = Model::start(true).await;
    for caller_closes_connection in [false, true] {
        let id = if caller_closes_connection { "a" } else { "b" };
        model.add(id);
        model.script.set("start", Answer::Late(Duration::from_secs(5)));
        let request = StartRequest { id: id.to_owned(), ..Default::default() };
        let client = model.client();
        if caller_closes_connection {
            let call = tokio::time::timeout(Duration::from_secs(1), client.start(within(BUDGET), &request));
            assert!(call.await.is_err());
            drop(client);
        } else {
            assert!(client.start(within(Duration::from_secs(1)), &request).await.is_err());
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(model.status(id).await, Status::RUNNING);
    }
}

/// Begins to create a container while the guest boots. The caller's connection ends at once.
async fn begin_create(model: &Model) {
    let bundle = model.dir.path().join("bundle");
    std::fs::create_dir(&bundle).unwrap();
    // A sandbox container needs no mounts.
    let spec = r#"{ "ociVersion": "1.0.2", "annotations": { "io.kubernetes.cri.container-type": "sandbox" } }"#;
    std::fs::write(bundle.join("config.json"), spec).unwrap();
    let bundle = bundle.to_str().unwrap().to_owned();
    let request = CreateTaskRequest { id: "model".to_owned(), bundle, ..Default::default() };
    let client = model.client();
    let call = tokio::time::timeout(Duration::from_secs(1), client.create(within(BUDGET), &request));
    assert!(call.await.is_err());
    assert!(!model.shim.containers.is_empty());
}

/// `cargo xtask chaos --replay 1:0:15` found that each request to the VMM and to the agent waited for its own timeout.
#[tokio::test(start_paused = true)]
async fn create_in_a_stopped_vmm_fails_after_one_timeout() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.host.hang(true);
    model.script.hang("*");
    let begin = Instant::now();
    let error = model.client().create(within(timeouts::SLOW * 3), &create(&model, "b")).await.unwrap_err().to_string();
    assert!(begin.elapsed() < timeouts::SLOW + timeouts::QUICK * 2, "{:?}", begin.elapsed());
    assert!(error.contains("the VMM did not answer the request AcquirePid within 60 s"), "{error}");
}

/// `cargo xtask chaos --failpoints` found that a start that had timed out waited for a hung VMM for a minute, to log where
/// the guest is.
#[tokio::test(start_paused = true)]
async fn start_that_timed_out_does_not_wait_for_a_hung_vmm() {
    let model = Model::start(true).await;
    model.host.hang(true);
    let begin = Instant::now();
    log_vcpus(&model.vmm).await;
    assert!(begin.elapsed() < HARDWARE.of(INSPECT_TIMEOUT) + SLACK, "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn create_completes_although_its_caller_disconnects() {
    let mut model = Model::boot(true).await;
    begin_create(&model).await;
    model.boot.take().unwrap().send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(model.status("model").await, Status::CREATED);
}

#[tokio::test(start_paused = true)]
async fn delete_and_shutdown_cancel_a_creation() {
    for deletes in [true, false] {
        let model = Model::boot(true).await;
        begin_create(&model).await;
        if deletes {
            let error = model.delete("model").await.unwrap_err().to_string();
            assert!(error.contains("container not created: not found"), "{error}");
            assert!(model.shim.containers.is_empty());
        }
        let request = ShutdownRequest { id: "model".to_owned(), ..Default::default() };
        model.client().shutdown(within(BUDGET), &request).await.unwrap();
        assert!(model.shim.containers.is_empty());
        // The shim has torn the sandbox down.
        tokio::time::timeout(BUDGET, model.shim.wait_finished()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn shim_ends_after_a_shutdown_that_arrived_during_the_last_deletes() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("b").await;
    for id in ["a", "b"] {
        let kill = KillRequest { id: id.to_owned(), signal: 9, ..Default::default() };
        model.client().kill(within(BUDGET), &kill).await.unwrap();
        model.wait(id).await;
    }
    model.script.set("delete", Answer::DoneLate(Duration::from_secs(3)));
    for id in ["a", "b"] {
        let delete = DeleteRequest { id: id.to_owned(), ..Default::default() };
        assert!(model.client().delete(within(Duration::from_secs(1)), &delete).await.is_err());
        let request = ShutdownRequest { id: id.to_owned(), ..Default::default() };
        model.client().shutdown(within(BUDGET), &request).await.unwrap();
    }
    assert!(!model.shim.containers.is_empty());
    tokio::time::timeout(BUDGET, model.shim.wait_finished()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn shim_ends_after_a_shutdown_that_arrived_during_a_creation() {
    let model = Model::start(true).await;
    // A creation is not cancelled while it waits for the VMM.
    model.host.hang(true);
    assert!(model.client().create(within(Duration::from_secs(1)), &create(&model, "b")).await.is_err());
    let request = ShutdownRequest { id: "b".to_owned(), ..Default::default() };
    model.client().shutdown(within(BUDGET), &request).await.unwrap();
    assert!(!model.shim.containers.is_empty(), "the creation has ended too early for this test");
    tokio::time::timeout(timeouts::SLOW * 2, model.shim.wait_finished()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn teardown_waits_for_a_launch_in_progress() {
    let model = Model::start(true).await;
    let launching = model.shim.sandbox_state.begin_launch();
    let shim = std::sync::Arc::clone(&model.shim);
    let finished = tokio::spawn(async move { shim.finish().await });
    tokio::time::sleep(BUDGET).await;
    assert!(!finished.is_finished(), "the processes and the cgroup of the launch stay");
    drop(launching);
    tokio::time::timeout(BUDGET, finished).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn second_delete_waits_for_the_first_one() {
    for first in [Answer::Late(Duration::from_secs(3)), Answer::Never] {
        let model = Model::start(true).await;
        model.add("a");
        model.run("other").await;
        model.script.set("delete", first);
        let delete = DeleteRequest { id: "a".to_owned(), ..Default::default() };
        assert!(model.client().delete(within(Duration::from_secs(1)), &delete).await.is_err());
        let error = model.delete("a").await.unwrap_err().to_string();
        assert!(error.contains("not found"), "{error}");
        assert!(model.shim.containers.get("a").is_err(), "the container exists, although containerd forgets it");
    }
}

#[tokio::test(start_paused = true)]
async fn second_delete_tries_again_after_the_first_one_has_failed() {
    let model = Model::start(true).await;
    model.add("a");
    model.run("other").await;
    model.script.hang("delete");
    let delete = DeleteRequest { id: "a".to_owned(), ..Default::default() };
    assert!(model.client().delete(within(Duration::from_secs(1)), &delete).await.is_err());
    let second = model.client();
    let second = tokio::spawn(async move { second.delete(within(BUDGET), &delete).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    model.script.set("delete", Answer::Error);
    assert_eq!(second.await.unwrap().unwrap().exit_status, 137);
    assert!(model.shim.containers.get("a").is_err());
}

#[tokio::test(start_paused = true)]
async fn kill_and_delete_succeed_although_the_connection_breaks_before_the_vmm_has_exited() {
    let model = Model::start(false).await;
    model.run("a").await;
    model.add("b");
    model.script.hang("*");
    let (kills, deletes) = (model.client(), model.client());
    let kill = KillRequest { id: "a".to_owned(), signal: 9, ..Default::default() };
    let delete = DeleteRequest { id: "b".to_owned(), ..Default::default() };
    let killed = tokio::spawn(async move { kills.kill(within(BUDGET), &kill).await });
    let deleted = tokio::spawn(async move { deletes.delete(within(BUDGET), &delete).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    model.shim.sandbox.agent().unwrap().close();
    assert_eq!(deleted.await.unwrap().unwrap().exit_status, 137);
    let error = killed.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("process already finished"), "{error}");
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
}

#[tokio::test(start_paused = true)]
async fn second_delete_ends_the_pod_if_the_agent_answers_with_errors() {
    let model = Model::start(true).await;
    model.add("a");
    model.run("other").await;
    model.script.set("delete", Answer::Error);
    assert!(model.delete("a").await.is_err());
    assert_eq!(model.reason(), "");
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    assert!(model.reason().starts_with("the agent failed twice to delete container a"), "{}", model.reason());
    assert_eq!(model.wait("other").await, 137);
}

#[tokio::test(start_paused = true)]
async fn delete_ends_the_requests_that_wait_for_the_container_and_its_execs() {
    let model = Model::start(true).await;
    model.add("other");
    let container = model.add("a");
    let spec = Any { value: br#"{ "args": ["true"], "cwd": "/" }"#.to_vec(), ..Default::default() };
    let exec = |exec_id: &str| ExecProcessRequest {
        id: "a".to_owned(),
        exec_id: exec_id.to_owned(),
        spec: Some(spec.clone()).into(),
        ..Default::default()
    };
    model.client().exec(within(BUDGET), &exec("added")).await.unwrap();
    let added = container.process("added").unwrap();
    let waits = tokio::spawn(async move { (container.init.wait().await.status, added.wait().await.status) });
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    let ended = tokio::time::timeout(Duration::from_secs(1), waits).await;
    assert_eq!(ended.expect("a wait does not end").unwrap(), (137, 137));
    assert_eq!(model.count(TASK_EXIT_EVENT_TOPIC), 0);
}

/// Adds the exec `e` to the container `a`.
async fn add_exec(model: &Model) {
    let spec = Any { value: br#"{ "args": ["true"], "cwd": "/" }"#.to_vec(), ..Default::default() };
    let exec = ExecProcessRequest {
        id: "a".to_owned(),
        exec_id: "e".to_owned(),
        spec: Some(spec).into(),
        ..Default::default()
    };
    model.client().exec(within(BUDGET), &exec).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn exec_whose_start_times_out_does_not_run_later() {
    let model = Model::start(true).await;
    model.run("a").await;
    add_exec(&model).await;
    model.script.set("start_exec", Answer::DoneLate(timeouts::SLOW + Duration::from_secs(1)));
    let start = StartRequest { id: "a".to_owned(), exec_id: "e".to_owned(), ..Default::default() };
    assert!(model.client().start(within(timeouts::SLOW * 2), &start).await.is_err());
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!model.script.runs("a", "e"), "the exec runs although its start has failed");
}

#[tokio::test(start_paused = true)]
async fn delete_with_output_ends_within_its_budget_although_the_guest_hangs() {
    let model = Model::start(false).await;
    model.add("other");
    let container = model.run("a").await;
    model.attach_silent_output(&container).await;
    model.script.exit("a", 0);
    assert_eq!(model.wait("a").await, 0);
    model.script.hang("*");
    let begin = Instant::now();
    assert_eq!(model.delete("a").await.unwrap().exit_status, 0);
    assert!(begin.elapsed() < BUDGET, "{:?}", begin.elapsed());
    model.process.abort();
}

#[tokio::test(start_paused = true)]
async fn output_ends_although_the_vmm_process_does_not_exit() {
    let model = Model::start(false).await;
    let container = model.run("a").await;
    model.attach_silent_output(&container).await;
    model.script.hang("*");
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(model.wait("a").await, 137);
    // containerd waits for the end of the output before it sends Delete.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(container.init.relay().is_none(), "the shim still copies the output");
    model.process.abort();
}

#[tokio::test(start_paused = true)]
async fn exec_that_waits_for_its_turn_fails_when_its_container_ends() {
    let model = Model::start(true).await;
    model.run("a").await;
    let waiting = start_more_execs_than_turns(&model).await;
    let begin = Instant::now();
    model.script.exit("a", 0);
    let error = waiting.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("cannot exec in a stopped state"), "{error}");
    assert!(begin.elapsed() < SLACK, "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn start_in_progress_does_not_hold_up_the_exit_if_the_vmm_process_does_not_exit() {
    let model = Model::start(false).await;
    model.run("b").await;
    model.add("a");
    model.script.hang("*");
    let (client, start) = (model.client(), StartRequest { id: "a".to_owned(), ..Default::default() });
    let started = tokio::spawn(async move { client.start(within(timeouts::SLOW * 2), &start).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    model.kill("b", libc::SIGKILL).await.unwrap();
    // The container counts as stopped, as after every start that fails.
    assert_eq!((model.wait("b").await, model.wait("a").await), (137, 255));
    let error = started.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the agent did not kill container b within 2 s"), "{error}");
    assert_eq!(model.delete("a").await.unwrap().exit_status, 255);
    model.process.abort();
}

#[tokio::test(start_paused = true)]
async fn shutdown_cancels_no_creation_while_the_pod_has_a_container() {
    let mut model = Model::boot(true).await;
    model.add("other");
    begin_create(&model).await;
    // containerd 1.7 sends this request after the deletion of each task, although the shim has other containers.
    let request = ShutdownRequest { id: "model".to_owned(), ..Default::default() };
    model.client().shutdown(within(BUDGET), &request).await.unwrap();
    model.boot.take().unwrap().send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(model.status("model").await, Status::CREATED);
}

#[tokio::test(start_paused = true)]
async fn exec_whose_start_fails_is_deleted_in_the_guest_when_it_has_exited() {
    let model = Model::start(true).await;
    model.run("a").await;
    add_exec(&model).await;
    model.script.set("start_exec", Answer::DoneLate(timeouts::SLOW + Duration::from_secs(1)));
    // The exit follows the answer to the signal.
    model.script.exits_late.store(true, Ordering::Relaxed);
    let start = StartRequest { id: "a".to_owned(), exec_id: "e".to_owned(), ..Default::default() };
    assert!(model.client().start(within(timeouts::SLOW * 2), &start).await.is_err());
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!model.script.known().contains(&("a".to_owned(), "e".to_owned())), "the guest still has the exec");
}
