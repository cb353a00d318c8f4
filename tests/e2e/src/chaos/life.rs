//! One life of the victim, with the fault in one phase.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};

use super::faults::{self, Armed, Field, Hold, sleep_until};
use super::grammar::Disturbed;
use super::plan::{Class, Fault, Phase, Step};
use super::probe::probe;
use super::victim::{Call, Ended, OVERTIME, START_BUDGET, STOP_BUDGET, Victim};
use super::{Shard, failpoints, targets};
use crate::cri::pod::text;
use crate::cri::restart;
use crate::events::Events;
use crate::figures::print_line;
use crate::{containerd_log, node};

/// Maximum number of attempts to remove the victim.
const ATTEMPTS: u32 = 4;
/// Time after which no further attempt to remove the victim begins. `cargo xtask test` stops the node if a test prints
/// nothing for five minutes.
const END: Duration = Duration::from_secs(150);
/// Longest time that a fault gets to have an effect on a container.
const EFFECT: Duration = Duration::from_secs(2);
/// Longest time in which containerd ends a request whose client has disconnected.
const DROPPED: Duration = Duration::from_secs(30);
/// A fault that ends earlier leaves enough time for each request that would otherwise kill the VM. The shortest timeout
/// is `KILL_ANSWER_TIMEOUT` of the shim, which is 10 s with the test node's factor.
const SHORT_FAULT: Duration = Duration::from_secs(5);
/// Shortest delay of a fault, so that containerd has received the request.
const SENT: Duration = Duration::from_millis(10);
/// The duration of a request that has not been measured.
const UNMEASURED: Duration = Duration::from_secs(1);
/// The seconds that StopContainer leaves a container to react to SIGTERM.
const GRACE: u64 = 2;

/// The query that a client drops while no other request is pending.
const IDLE_QUERY: &str = "ListContainerStats";

/// A life in progress.
pub struct Life<'a, 'b> {
    /// What the steps share.
    pub shard: &'a mut Shard<'b>,
    step: Step,
    /// The number of the attempt, from 0.
    attempt: u32,
    random: Rng,
    /// Length of containerd's log when the life began.
    pub log: usize,
    /// Ids of the containers that had events before the life began.
    pub earlier_ids: BTreeSet<String>,
    /// The victim.
    pub victim: Victim,
    pod: Option<String>,
    container: Option<String>,
    armed: Option<Armed>,
    /// How long the fault lasts, once it is injected.
    hold: Option<Hold>,
    struck: bool,
    /// When the last fault was healed.
    healed: Option<Instant>,
    missed: Option<String>,
    /// What may have disturbed the events.
    pub disturbed: Disturbed,
    /// Subscriptions that ended with their containerd.
    pub ended_events: Vec<Events>,
    /// What is wrong.
    pub findings: Vec<String>,
}

impl<'a, 'b> Life<'a, 'b> {
    /// Prepares the life of a step.
    fn new(shard: &'a mut Shard<'b>, step: Step, attempt: u32) -> Self {
        let victim = Victim::new(shard.pods);
        Self {
            earlier_ids: shard.events.ids_so_far(),
            shard,
            step,
            attempt,
            // The first attempt uses the step's own seed, so that a recorded step keeps its meaning.
            random: Rng::with_seed(step.random.wrapping_add(u64::from(attempt))),
            log: containerd_log::len(),
            victim,
            pod: None,
            container: None,
            armed: None,
            hold: None,
            struck: matches!(step.fault, Fault::Failpoint | Fault::Nothing),
            healed: None,
            missed: None,
            disturbed: Disturbed { repeated: step.fault == Fault::Failpoint, ..Disturbed::default() },
            ended_events: Vec::new(),
            findings: Vec::new(),
        }
    }
}

/// Runs the life of a victim with the fault of `step`, and then calls `judge`. Returns why the fault has not struck,
/// and what is wrong.
pub fn run(
    shard: &mut Shard<'_>,
    step: Step,
    attempt: u32,
    judge: fn(&mut Life<'_, '_>),
) -> (Option<String>, Vec<String>) {
    let mut life = Life::new(shard, step, attempt);
    life.guarded("life", Life::live);
    life.guarded("end", Life::end);
    life.guarded("healing", Life::heal);
    if !life.struck {
        life.missed = Some("the phase was not reached".to_owned());
    }
    life.guarded("judgement", judge);
    life.victim.clean_up();
    (life.missed, life.findings)
}

impl Life<'_, '_> {
    /// Runs a part of the life. A panic, for example because containerd does not start, is a finding.
    fn guarded(&mut self, name: &str, part: impl FnOnce(&mut Self)) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| part(self))) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            self.findings.push(format!("{name}: {}", text.unwrap_or_else(|| "panicked".to_owned())));
            if restart::containerd_pid().is_none() {
                restart::start_containerd();
            }
        }
    }

    /// Whether to inject the step's fault in this phase.
    fn strikes(&self, phase: Phase) -> bool {
        self.step.phase == phase && !self.struck
    }

    /// Runs the victim up to its removal.
    fn live(&mut self) {
        let request = self.victim.run_request();
        let answer = self.request(Phase::RunPodSandbox, "RunPodSandbox", request, START_BUDGET);
        self.pod = answer.map(|answer| text(&answer["pod_sandbox_id"])).or_else(|| {
            // The kubelet removes a pod whose RunPodSandbox has failed. Therefore only a ready pod continues its life.
            self.victim.pods().ok()?.into_iter().find(|(_, ready)| *ready).map(|(id, _)| id)
        });
        self.victim.ids.extend(self.pod.clone());
        if self.pod.is_none() || !self.run_container() {
            return;
        }
        // A SIGTERM before the script has set its trap would be lost, and StopContainer would wait for its whole
        // timeout.
        self.writes();
        if self.step.fault == Fault::Failpoint {
            self.add_interface();
        }
        if self.strikes(Phase::Running) {
            self.strike();
            self.await_effect();
            self.probe_others();
            self.replace();
        }
        if self.strikes(Phase::Exec) || matches!(self.step.fault, Fault::Failpoint | Fault::Nothing) {
            let command = ["sh", "-c", "echo a; sleep 1; echo b"];
            let request = json!({ "container_id": self.container, "cmd": command, "timeout": 30 });
            self.request(Phase::Exec, "ExecSync", request, START_BUDGET);
        }
        if self.step.fault == Fault::Nothing {
            self.request(Phase::Idle, IDLE_QUERY, json!({}), START_BUDGET);
        }
    }

    /// Adds an interface to the running pod if the failpoint needs one.
    fn add_interface(&mut self) {
        let known = &self.shard.namespaces;
        let namespace = targets::network_namespaces().into_iter().find(|path| !known.contains(path));
        let namespace = namespace.ok_or_else(|| "the victim has no network namespace".to_owned());
        self.findings.extend(namespace.and_then(|path| failpoints::add_interface(&path)).err());
    }

    /// Creates and starts a container. Returns whether the container has started.
    fn run_container(&mut self) -> bool {
        let Some(pod) = self.pod.clone() else { return false };
        let request = self.victim.create_request(&pod, faults::equipment(self.step.fault));
        let answer = self.request(Phase::CreateContainer, "CreateContainer", request, START_BUDGET);
        let Some(answer) = answer else { return false };
        let id = text(&answer["container_id"]);
        self.victim.ids.push(id.clone());
        self.container = Some(id.clone());
        let started =
            self.request(Phase::StartContainer, "StartContainer", json!({ "container_id": id }), START_BUDGET);
        started.is_some()
    }

    /// Waits until the container writes to its file. After a fault, the container may never write.
    fn writes(&self) {
        let Some(file) = self.victim.writers.last() else { return };
        let limit = if self.struck { Duration::from_secs(GRACE) } else { Duration::from_secs(20) };
        sleep_until(limit, || file.size() > 0);
    }

    /// Waits until the container has met the fault: it has written twice more. A container that has ended, or that the
    /// fault stops, does not write.
    fn await_effect(&self) {
        let Some(writer) = self.victim.writers.last() else { return };
        let size = writer.size();
        sleep_until(EFFECT, || writer.size() >= size + 4);
    }

    /// Waits until containerd has ended a RunPodSandbox whose client has disconnected. Until then, containerd does not
    /// list the pod, and can still be making it.
    fn await_dropped(&self) {
        if self.step.fault != Fault::DropRequest || self.step.phase != Phase::RunPodSandbox || self.missed.is_some() {
            return;
        }
        node::eventually(DROPPED, || ended_pod(&containerd_log::since(self.log), &self.victim.name).then_some(()));
    }

    /// Starts a container in place of one that has ended, as a kubelet does.
    fn replace(&mut self) {
        let Some(pod) = self.pod.clone() else { return };
        let ready = self.victim.pods().is_ok_and(|pods| pods.iter().any(|(id, ready)| *id == pod && *ready));
        let containers = self.victim.containers(&pod).unwrap_or_default();
        if ready && !containers.is_empty() && containers.iter().all(|(.., running)| !running) {
            self.run_container();
        }
    }

    /// Removes the victim, as a kubelet does: retries requests that fail.
    fn end(&mut self) {
        self.await_dropped();
        let (mut last, begin) = (String::new(), Instant::now());
        for attempt in 0..ATTEMPTS {
            if begin.elapsed() > END {
                break;
            }
            match self.victim.pods() {
                Ok(pods) if pods.is_empty() => return,
                Ok(pods) => pods.iter().for_each(|(pod, _)| self.end_pod(pod, attempt, &mut last)),
                Err(status) => last = status.to_string(),
            }
            if self.victim.pods().is_ok_and(|pods| pods.is_empty()) {
                return;
            }
            // A kubelet, too, waits before it retries.
            thread::sleep(Duration::from_secs(2));
        }
        if !self.victim.pods().is_ok_and(|pods| pods.is_empty()) {
            self.findings.push(format!("the pod was not removed within {:.0?}: {last}", begin.elapsed()));
        }
    }

    fn end_pod(&mut self, pod: &str, attempt: u32, last: &mut String) {
        let phase = self.step.phase;
        let early = matches!(phase, Phase::StopPodSandbox | Phase::RemovePodSandbox) && attempt == 0;
        if !early {
            for (id, ..) in self.victim.containers(pod).unwrap_or_default() {
                let request = json!({ "container_id": id, "timeout": GRACE });
                self.request(Phase::StopContainer, "StopContainer", request, STOP_BUDGET);
                if phase == Phase::Idle {
                    self.request(phase, "RemoveContainer", json!({ "container_id": id }), STOP_BUDGET);
                }
            }
            let _ = self.victim.containers(pod);
        }
        if self.strikes(Phase::Idle) {
            self.strike();
            if self.step.fault.class() == Class::FileSystems {
                // Without a container, nothing would meet the fault.
                self.run_container();
            }
            self.await_effect();
        }
        let request = json!({ "pod_sandbox_id": pod });
        let mut ended = true;
        if !(early && phase == Phase::RemovePodSandbox) {
            ended = self.request(Phase::StopPodSandbox, "StopPodSandbox", request.clone(), STOP_BUDGET).is_some();
            if ended {
                self.victim.writers.iter_mut().for_each(super::victim::Writer::has_ended);
            }
        }
        if ended {
            ended = self.request(Phase::RemovePodSandbox, "RemovePodSandbox", request, STOP_BUDGET).is_some();
        }
        if ended {
            self.victim.writers.iter_mut().for_each(super::victim::Writer::has_ended);
        } else {
            *last = "a request failed".to_owned();
        }
    }

    /// Makes a request, and judges its duration. If the phase is the step's phase, injects the fault during the
    /// request. Returns the answer, or `None` if the request failed.
    fn request(&mut self, phase: Phase, method: &'static str, request: Value, budget: Duration) -> Option<Value> {
        let strikes = self.strikes(phase) && method != "RemoveContainer";
        let drops = strikes && self.step.fault == Fault::DropRequest;
        let delay = self.delay(method, drops);
        let early = strikes && !drops && phase != Phase::RunPodSandbox && {
            // After such a request, no container is left into which the fault could be injected.
            let last_chance = phase.ends_container() && self.step.fault.needs_container();
            self.random.u8(..4) == 0 || last_chance
        };
        let call = if early {
            self.arm();
            Call::start(method, request, budget + OVERTIME)
        } else {
            Call::start(method, request, if drops { delay } else { budget + OVERTIME })
        };
        if strikes && !early && !drops {
            sleep_until(delay, || call.has_ended());
            self.arm();
        }
        if strikes {
            self.struck = true;
            self.hold();
        }
        let ended = call.join();
        if drops {
            self.missed = missed_drop(&ended);
        }
        if self.step.fault == Fault::Nothing {
            self.shard.usual.insert(method, ended.end - ended.begin);
        }
        let begin = self.healed.map_or(ended.begin, |healed| healed.max(ended.begin));
        let took = ended.end.saturating_duration_since(begin);
        if took > budget && !drops {
            self.findings.push(format!("{method} took {took:.1?}, its limit is {budget:?}"));
        }
        match ended.result {
            Ok(answer) => Some(answer),
            Err(status) => {
                print_line(format_args!("    {method} failed after {:.1?}: {status}", ended.end - ended.begin));
                if !self.struck || self.missed.is_some() || self.step.fault == Fault::Nothing {
                    self.findings.push(format!("{method} failed without a fault: {status}"));
                }
                None
            }
        }
    }

    /// Returns the delay between the begin of a request and the fault: a random part of the request's usual duration.
    /// If the fault struck too late in an earlier attempt, the delay is shorter.
    fn delay(&mut self, method: &str, drops: bool) -> Duration {
        let usual = self.shard.usual.get(method).copied().unwrap_or(UNMEASURED);
        let part = self.random.f64() * if drops { 0.9 } else { 1.2 };
        usual.mul_f64(part * 0.5_f64.powi(self.attempt.cast_signed())).max(SENT)
    }

    /// Injects the fault while no request is pending.
    fn strike(&mut self) {
        if self.step.fault == Fault::DropRequest {
            self.drop_query();
        }
        self.arm();
        self.struck = true;
        self.hold();
    }

    /// Drops a query or an exec, because no other request is pending.
    fn drop_query(&mut self) {
        let (limit, method, request) = match &self.container {
            Some(id) if self.step.phase == Phase::Running => {
                let limit = Duration::from_secs_f64(self.random.f64());
                (limit, "ExecSync", json!({ "container_id": id, "cmd": ["sleep", "5"], "timeout": 30 }))
            }
            _ => (self.delay(IDLE_QUERY, true), IDLE_QUERY, json!({})),
        };
        self.missed = missed_drop(&Call::start(method, request, limit).join());
    }

    fn arm(&mut self) {
        self.struck = true;
        match self.step.fault {
            Fault::KillShim | Fault::TermShim | Fault::PodMemory => self.disturbed.repeated = true,
            Fault::KillContainerd | Fault::TermContainerd => self.disturbed.lossy = true,
            Fault::StopContainerd => self.disturbed.unconfirmed = true,
            _ => {}
        }
        let mut field = Field {
            victim: &self.victim,
            pod: self.pod.as_deref(),
            container: self.container.as_deref(),
            witness: &self.shard.witness.pod.id,
            namespaces: &self.shard.namespaces,
            sockets: &self.shard.sockets,
            appears: faults::appearance_timeout(self.step.phase),
            random: &mut self.random,
        };
        match faults::arm(self.step.fault, &mut field) {
            Ok(armed) => {
                self.hold = Some(armed.hold);
                self.armed = Some(armed);
            }
            Err(why) => self.missed = Some(why),
        }
    }

    /// Waits until a short fault is over, and ends it. Probes the node during a long fault.
    fn hold(&mut self) {
        match self.armed.as_ref().map(|armed| armed.hold) {
            Some(Hold::Short(time)) => {
                thread::sleep(time);
                self.heal();
            }
            Some(Hold::Life) => self.probe_others(),
            None => {}
        }
    }

    /// Ends the fault.
    fn heal(&mut self) {
        let Some(mut armed) = self.armed.take() else { return };
        armed.heal();
        self.healed = Some(Instant::now());
        if self.disturbed.lossy {
            let ended = std::mem::replace(&mut self.shard.events, Events::watch());
            self.ended_events.push(ended);
        }
    }

    /// Makes queries that a fault of the victim must not delay.
    fn probe_others(&mut self) {
        let findings = probe(self.shard.witness.id(), self.container.as_deref());
        self.findings.extend(findings);
    }

    /// Returns whether the pod may end because of the fault. A VM that has not booted yet may always end, because a
    /// fault may make the request fail.
    pub fn may_end_pod(&self) -> bool {
        let short = match self.hold {
            Some(Hold::Short(time)) => time < SHORT_FAULT,
            Some(Hold::Life) | None => false,
        };
        self.step.phase == Phase::RunPodSandbox || self.step.fault.may_end_pod(short)
    }

    /// Returns whether the step kills or restarts containerd.
    pub fn restarts_containerd(&self) -> bool {
        matches!(self.step.fault, Fault::KillContainerd | Fault::TermContainerd)
    }
}

/// Returns why a client that disconnected has not interrupted its request.
fn missed_drop(ended: &Ended) -> Option<String> {
    match &ended.result {
        Err(status) if status.is_deadline() => None,
        Ok(_) => Some("the request ended before its client disconnected".to_owned()),
        Err(status) => Some(format!("the request failed before its client disconnected: {status}")),
    }
}

/// Returns whether containerd has logged the end of the RunPodSandbox request of a pod. containerd 2.x quotes the name
/// in another way.
fn ended_pod(log: &str, name: &str) -> bool {
    let names = [format!("Name:{name},"), format!("name:\\\"{name}\\\"")];
    log.lines().filter(|line| line.contains("RunPodSandbox for ")).any(|line| {
        names.iter().any(|name| line.contains(name))
            && ["returns sandbox id", "failed, error"].iter().any(|end| line.contains(end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Status;

    #[test]
    fn end_of_a_dropped_pod_is_found_in_the_log() {
        let pod = |name: &str, rest: &str| {
            format!("level=info msg=\"RunPodSandbox for &PodSandboxMetadata{{Name:{name},Uid:u,Attempt:0,}}{rest}\"\n")
        };
        assert!(!ended_pod(&pod("chaos-1", ""), "chaos-1"));
        assert!(!ended_pod(&pod("chaos-17", " returns sandbox id \\\"a\\\""), "chaos-1"));
        assert!(ended_pod(&pod("chaos-1", " returns sandbox id \\\"a\\\""), "chaos-1"));
        assert!(ended_pod(&pod("chaos-1", " failed, error"), "chaos-1"));
        let second = r#"msg="RunPodSandbox for name:\"chaos-1\" uid:\"u\" failed, error""#;
        assert!(ended_pod(second, "chaos-1") && !ended_pod(second, "chaos-12"));
    }

    #[test]
    fn request_that_ends_by_itself_is_no_dropped_request() {
        let missed = |result| missed_drop(&Ended { result, begin: Instant::now(), end: Instant::now() });
        assert_eq!(missed(Err(Status::no_response(Duration::ZERO))), None);
        assert!(missed(Ok(json!({}))).is_some());
        assert!(missed(Err(Status { code: 4, message: "context deadline exceeded".to_owned() })).is_some());
    }
}
