//! Random sequences of requests and faults.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tokio::task::JoinSet;

use super::agent::Answer;
use super::check::conclude;
use super::model::Model;
use super::process::{Scenarios, in_own_process};
use super::requests::{ALL, CONTAINER, Call, EXEC, OTHER, bytes, create};

/// The number of sequences, unless the environment variable `PROPTEST_CASES` has another number.
const CASES: u32 = 150;
/// The maximum number of steps of a sequence.
const STEPS: usize = 40;
/// The limit of a request that waits for a guest and a VMM that do not answer.
const SLOWEST: Duration = Duration::from_secs(600);

/// How a client makes a request.
#[derive(Debug, Clone, Copy)]
enum Caller {
    /// It waits for the answer for a while. The request then continues in the background.
    Waits,
    /// It does not wait for the answer.
    GoesOn,
    /// It drops the request after a while.
    Drops(u64),
    /// It closes the connection after a while.
    Closes(u64),
}

#[derive(Debug, Clone)]
enum Step {
    Call(Call, Caller),
    CreateOther,
    /// The agent answers a method in another way from now on.
    Answer(&'static str, Answer),
    /// The agent answers all methods normally from now on.
    Recover,
    Freeze(bool),
    Crash,
    VmmHangs(bool),
    VmmRefuses(bool),
    Exit(u32),
    ExitOfExec(u32),
    ExitsEarly(bool),
    Immortal(bool),
    ContainerdDown(bool),
    Sleep(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let methods = ["create", "start", "start_exec", "exec", "kill", "delete", "pids", "stats", "pause", "update", "*"];
    let answer = prop_oneof![
        (0u64..70_000).prop_map(|ms| Answer::Late(Duration::from_millis(ms))),
        (0u64..70_000).prop_map(|ms| Answer::DoneLate(Duration::from_millis(ms))),
        Just(Answer::Never),
        Just(Answer::Error),
        Just(Answer::Lie),
    ];
    let caller = prop_oneof![
        3 => Just(Caller::Waits),
        2 => Just(Caller::GoesOn),
        1 => (0u64..50).prop_map(Caller::Drops),
        1 => (0u64..50).prop_map(Caller::Closes),
    ];
    // Without these requests, most sequences would have no process.
    let ordinary = select(vec![Call::Create, Call::Start, Call::Exec, Call::StartExec, Call::Delete, Call::Kill]);
    let step = prop_oneof![
        8 => (ordinary, caller.clone()).prop_map(|(call, caller)| Step::Call(call, caller)),
        6 => (select(ALL.to_vec()), caller).prop_map(|(call, caller)| Step::Call(call, caller)),
        1 => Just(Step::CreateOther),
        3 => (select(methods.to_vec()), answer).prop_map(|(method, answer)| Step::Answer(method, answer)),
        2 => Just(Step::Recover),
        1 => any::<bool>().prop_map(Step::Freeze),
        1 => Just(Step::Crash),
        1 => any::<bool>().prop_map(Step::VmmHangs),
        1 => any::<bool>().prop_map(Step::VmmRefuses),
        1 => (0u32..300).prop_map(Step::Exit),
        1 => (0u32..300).prop_map(Step::ExitOfExec),
        1 => any::<bool>().prop_map(Step::ExitsEarly),
        1 => any::<bool>().prop_map(Step::Immortal),
        1 => any::<bool>().prop_map(Step::ContainerdDown),
        3 => (0u64..20_000).prop_map(Step::Sleep),
    ];
    proptest::collection::vec(step, 0..=STEPS)
}

async fn call(model: &Model, running: &mut JoinSet<()>, request: ttrpc::Request, caller: Caller) {
    let client = model.connect();
    let keep = client.clone();
    let work = async move { drop(client.request(request).await) };
    match caller {
        Caller::Waits | Caller::GoesOn => {
            running.spawn(work);
            if matches!(caller, Caller::Waits) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Caller::Drops(ms) | Caller::Closes(ms) => {
            let _ = tokio::time::timeout(Duration::from_millis(ms), work).await;
            if matches!(caller, Caller::Drops(_)) {
                running.spawn(async move {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    drop(keep);
                });
            }
        }
    }
}

async fn run(steps: Vec<Step>) {
    let mut model = Model::boot(true).await;
    model.mount_share();
    model.finish_boot_if_alive().await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let (mut running, mut waits) = (JoinSet::new(), JoinSet::new());
    for step in steps {
        match step {
            Step::Call(which, caller) if !which.is_wait() => {
                call(&model, &mut running, which.request(&model), caller).await;
            }
            Step::Call(which, _) => call(&model, &mut waits, which.request(&model), Caller::GoesOn).await,
            Step::CreateOther => {
                let mut request = Call::Create.request(&model);
                request.payload = bytes(&create(&model, OTHER));
                call(&model, &mut running, request, Caller::Waits).await;
            }
            Step::Answer(method, answer) => model.script.set(method, answer),
            Step::Recover => model.script.recover(),
            Step::Freeze(frozen) => model.frozen.send_modify(|now| *now = frozen),
            Step::Crash => model.crash.notify_one(),
            Step::VmmHangs(hangs) => model.host.hang(hangs),
            Step::VmmRefuses(refuses) => model.host.refuse(refuses),
            Step::Exit(status) => model.script.exit(CONTAINER, status),
            Step::ExitOfExec(status) => model.script.exit_of(CONTAINER, EXEC, status),
            Step::ExitsEarly(early) => model.script.exits_early.store(early, Ordering::Relaxed),
            Step::Immortal(immortal) => model.script.immortal.store(immortal, Ordering::Relaxed),
            Step::ContainerdDown(down) => model.containerd_down.store(down, Ordering::Relaxed),
            Step::Sleep(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
    }
    let all = async { while running.join_next().await.is_some() {} };
    assert!(tokio::time::timeout(SLOWEST, all).await.is_ok(), "a request does not end within {SLOWEST:?}");
    // Requests continue without their clients.
    tokio::time::sleep(SLOWEST).await;
    conclude(&model).await;
    // A Wait request ends with its process, its container or the sandbox.
    let all = async { while waits.join_next().await.is_some() {} };
    assert!(tokio::time::timeout(Duration::from_secs(10), all).await.is_ok(), "a Wait request does not end");
    model.end().await;
}

#[test]
fn random_sequences_leave_nothing_half_done() {
    in_own_process(|| {
        let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
        let config = Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut first = Scenarios::default();
        first.run("nothing".into(), run(Vec::new()));
        let result = TestRunner::new_with_rng(config, rng).run(&steps(), |steps| {
            let mut scenarios = first.again();
            scenarios.run(String::new(), run(steps));
            scenarios.failure().map_or(Ok(()), |text| Err(TestCaseError::fail(text.to_owned())))
        });
        first.end();
        if let Err(error) = result {
            panic!("{error}");
        }
    });
}
