//! The plan of all shards, which is computed from the seed alone.

use std::fmt;
use std::str::FromStr;

use fastrand::Rng;

/// Number of shards. Each shard runs in its own boot of the node.
pub const SHARDS: usize = 10;
/// Number of faults of a shard.
pub const STEPS: usize = 50;

/// The phase of a pod's life in which a fault is injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The sandbox is made and started.
    RunPodSandbox,
    /// The container is created.
    CreateContainer,
    /// The container is started.
    StartContainer,
    /// The container runs, and no request is pending.
    Running,
    /// A command runs in the container.
    Exec,
    /// The container is stopped.
    StopContainer,
    /// The pod is stopped while its container runs.
    StopPodSandbox,
    /// The pod is removed while its container runs.
    RemovePodSandbox,
    /// The pod runs, and its container has been removed.
    Idle,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 9] = [
        Self::RunPodSandbox,
        Self::CreateContainer,
        Self::StartContainer,
        Self::Running,
        Self::Exec,
        Self::StopContainer,
        Self::StopPodSandbox,
        Self::RemovePodSandbox,
        Self::Idle,
    ];

    /// Returns whether the phase's request ends the container.
    pub fn ends_container(self) -> bool {
        matches!(self, Self::StopContainer | Self::StopPodSandbox | Self::RemovePodSandbox)
    }

    /// Returns whether the pod has a running container in this phase.
    fn has_container(self) -> bool {
        use Phase::{Exec, RemovePodSandbox, Running, StopContainer, StopPodSandbox};
        matches!(self, Running | Exec | StopContainer | StopPodSandbox | RemovePodSandbox)
    }
}

/// A class of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Processes of the node are killed or stopped.
    Processes,
    /// Clients and containerd end during a request.
    Callers,
    /// Containers use up what they have.
    Guest,
    /// The node or the pod has no more of a resource.
    Limits,
    /// A file system of the node fails.
    FileSystems,
    /// The pod's network changes.
    Network,
    /// Streams stall.
    Stdio,
    /// Time steps or stops.
    Time,
}

impl Class {
    /// All classes, each with its share of the faults of a seed.
    pub const SHARES: [(Self, usize); 8] = [
        (Self::Processes, 140),
        (Self::Callers, 90),
        (Self::Guest, 70),
        (Self::Limits, 60),
        (Self::FileSystems, 50),
        (Self::Network, 40),
        (Self::Stdio, 30),
        (Self::Time, 20),
    ];
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The shim gets SIGKILL.
    KillShim,
    /// The shim gets SIGTERM.
    TermShim,
    /// The shim is stopped for a while (SIGSTOP).
    StopShim,
    /// The VMM gets SIGKILL.
    KillVmm,
    /// The VMM gets SIGTERM.
    TermVmm,
    /// The VMM is stopped until the pod has been removed.
    StopVmm,
    /// The launcher gets SIGKILL.
    KillLauncher,
    /// The launcher is stopped until the pod has been removed.
    StopLauncher,
    /// containerd gets SIGTERM, and starts again.
    TermContainerd,
    /// containerd is stopped for a while.
    StopContainerd,
    /// The client disconnects while its request runs.
    DropRequest,
    /// containerd is killed while a request runs, and starts again.
    KillContainerd,
    /// The pod's cgroup gets 2 % of a CPU for a while.
    StarvePod,
    /// A busy loop in a container with 1 % of a CPU.
    BusyLoop,
    /// A container starts processes up to its limit.
    ForkBomb,
    /// A container exceeds its memory limit.
    ContainerMemory,
    /// A container uses all memory of the guest.
    GuestMemory,
    /// The shim has no free fd for a while.
    ShimFds,
    /// The VMM has no free fd for a while.
    VmmFds,
    /// The pod's cgroup has no free pid.
    PodPids,
    /// The pod's cgroup gets a memory limit just above its use.
    PodMemory,
    /// `/run` is nearly full for a while.
    RunFull,
    /// No inotify instance and no watch can be made.
    NoInotify,
    /// A hostPath's file system is frozen (FIFREEZE).
    Freeze,
    /// A hostPath's file system has no free space.
    NoSpace,
    /// A hostPath's file system becomes read-only.
    ReadOnly,
    /// The pod's interface goes down and up.
    LinkDown,
    /// The pod's interface is deleted.
    LinkDeleted,
    /// A route of the pod is added and deleted many times.
    RouteFlaps,
    /// The client of an exec reads nothing.
    StalledExec,
    /// The client of a forwarded port reads nothing.
    StalledForward,
    /// The client of an attach is killed.
    KilledAttach,
    /// A client of the shim's socket sends half a request.
    HalfRequest,
    /// The node's clock goes forward by an hour, and back after a while.
    ClockForward,
    /// The node's clock goes back by an hour, and forward after a while.
    ClockBack,
    /// The container is paused for a while.
    Pause,
    /// An action at a failpoint of shim, VMM or agent ([`super::failpoints`]). Not part of a seed's plan.
    Failpoint,
    /// No fault: the rehearsal of a shard. Not part of a seed's plan.
    Nothing,
}

impl Fault {
    /// All faults of a plan.
    pub const ALL: [Self; 36] = [
        Self::KillShim,
        Self::TermShim,
        Self::StopShim,
        Self::KillVmm,
        Self::TermVmm,
        Self::StopVmm,
        Self::KillLauncher,
        Self::StopLauncher,
        Self::TermContainerd,
        Self::StopContainerd,
        Self::DropRequest,
        Self::KillContainerd,
        Self::StarvePod,
        Self::BusyLoop,
        Self::ForkBomb,
        Self::ContainerMemory,
        Self::GuestMemory,
        Self::ShimFds,
        Self::VmmFds,
        Self::PodPids,
        Self::PodMemory,
        Self::RunFull,
        Self::NoInotify,
        Self::Freeze,
        Self::NoSpace,
        Self::ReadOnly,
        Self::LinkDown,
        Self::LinkDeleted,
        Self::RouteFlaps,
        Self::StalledExec,
        Self::StalledForward,
        Self::KilledAttach,
        Self::HalfRequest,
        Self::ClockForward,
        Self::ClockBack,
        Self::Pause,
    ];

    /// Returns the fault's class.
    pub fn class(self) -> Class {
        use Fault::*;
        match self {
            KillShim | TermShim | StopShim | KillVmm | TermVmm | StopVmm | KillLauncher | StopLauncher
            | TermContainerd | StopContainerd | Failpoint | Nothing => Class::Processes,
            DropRequest | KillContainerd => Class::Callers,
            StarvePod | BusyLoop | ForkBomb | ContainerMemory | GuestMemory => Class::Guest,
            ShimFds | VmmFds | PodPids | PodMemory | RunFull | NoInotify => Class::Limits,
            Freeze | NoSpace | ReadOnly => Class::FileSystems,
            LinkDown | LinkDeleted | RouteFlaps => Class::Network,
            StalledExec | StalledForward | KilledAttach | HalfRequest => Class::Stdio,
            ClockForward | ClockBack | Pause => Class::Time,
        }
    }

    /// Returns whether the fault can be injected in this phase.
    pub fn applies(self, phase: Phase) -> bool {
        !self.needs_container() || phase.has_container()
    }

    /// Returns whether the pod may end because of the fault, if the pod ran before. `short` says whether the fault ends
    /// by itself before the shim's timeouts. The end of a pod because of any other fault is needless.
    pub fn may_end_pod(self, short: bool) -> bool {
        use Fault::*;
        match self {
            // The fault ends a process of the pod, or the guest does not run.
            KillShim | TermShim | KillVmm | TermVmm | StopVmm | Failpoint => true,
            // The node's OOM killer kills the VMM. The guest, too, can fail without memory.
            PodMemory | GuestMemory => true,
            // A container that does not exit after SIGKILL ends its pod: a process waits for the file system, or has
            // too little CPU time for its exit (`docs/reliability.md`, slow nodes).
            Freeze | BusyLoop => true,
            StarvePod => !short,
            _ => false,
        }
    }

    /// Returns whether the fault needs a running container.
    pub fn needs_container(self) -> bool {
        use Fault::*;
        matches!(
            self,
            BusyLoop | ForkBomb | ContainerMemory | GuestMemory | StalledExec | StalledForward | KilledAttach | Pause
        )
    }
}

/// One fault of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Names the fault for a replay.
    pub id: StepId,
    /// The phase in which the fault is injected.
    pub phase: Phase,
    /// The fault.
    pub fault: Fault,
    /// Seed of the step's own random numbers, such as the delay before the fault.
    pub random: u64,
}

/// Names a step: `SEED:SHARD:STEP`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepId {
    /// The seed.
    pub seed: u64,
    /// The shard, from 0.
    pub shard: usize,
    /// The number in the shard, from 0.
    pub step: usize,
}

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.seed, self.shard, self.step)
    }
}

impl FromStr for StepId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let mut parts = text.split(':');
            let id = Self {
                seed: parts.next()?.parse().ok()?,
                shard: parts.next()?.parse().ok()?,
                step: parts.next()?.parse().ok()?,
            };
            (parts.next().is_none() && id.shard < SHARDS && id.step < STEPS).then_some(id)
        };
        parse().ok_or_else(|| format!("expected SEED:SHARD:STEP with a shard below {SHARDS} and a step below {STEPS}"))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {:?}  {:?}/{:?}", self.id, self.phase, self.fault.class(), self.fault)
    }
}

/// Returns all steps of a seed, in order: first each pair of a phase and a class once, then random pairs. The classes
/// have the shares of [`Class::SHARES`].
pub fn plan(seed: u64) -> Vec<Step> {
    let mut random = Rng::with_seed(seed);
    let mut pairs: Vec<(Phase, Class)> = Vec::new();
    let mut rest: Vec<(Phase, Class)> = Vec::new();
    for (class, share) in Class::SHARES {
        pairs.extend(Phase::ALL.map(|phase| (phase, class)));
        for _ in Phase::ALL.len()..share {
            rest.push((Phase::ALL[random.usize(..Phase::ALL.len())], class));
        }
    }
    random.shuffle(&mut pairs);
    random.shuffle(&mut rest);
    pairs.extend(rest);
    let step = |(number, (phase, class)): (usize, (Phase, Class))| {
        let fit: Vec<Fault> =
            Fault::ALL.into_iter().filter(|fault| fault.class() == class && fault.applies(phase)).collect();
        let id = StepId { seed, shard: number / STEPS, step: number % STEPS };
        Step { id, phase, fault: fit[random.usize(..fit.len())], random: random.u64(..) }
    };
    pairs.into_iter().enumerate().map(step).collect()
}

/// Returns the steps of one shard.
pub fn shard(seed: u64, shard: usize) -> Vec<Step> {
    plan(seed).into_iter().filter(|step| step.id.shard == shard).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn plan_has_all_pairs_first_and_the_shares() {
        let steps = plan(7);
        assert_eq!(steps.len(), SHARDS * STEPS);
        let pairs: BTreeSet<_> = steps[..72].iter().map(|step| (step.phase, step.fault.class())).collect();
        assert_eq!(pairs.len(), 72);
        for (class, share) in Class::SHARES {
            assert_eq!(steps.iter().filter(|step| step.fault.class() == class).count(), share, "{class:?}");
        }
        assert!(steps.iter().all(|step| step.fault.applies(step.phase)));
        let faults: BTreeSet<_> = steps.iter().map(|step| step.fault).collect();
        assert_eq!(faults.len(), Fault::ALL.len(), "a fault never strikes");
    }

    #[test]
    fn only_faults_that_outlast_the_timeouts_may_end_the_pod() {
        for fault in [Fault::StopShim, Fault::StopLauncher, Fault::Pause, Fault::NoSpace, Fault::Nothing] {
            assert!(!fault.may_end_pod(false) && !fault.may_end_pod(true), "{fault:?}");
        }
        assert!(Fault::StarvePod.may_end_pod(false) && !Fault::StarvePod.may_end_pod(true));
        assert!(Fault::StopVmm.may_end_pod(true));
    }

    #[test]
    fn plan_depends_on_the_seed_alone() {
        assert_eq!(plan(3), plan(3));
        assert_ne!(plan(3), plan(4));
        assert_eq!(shard(3, 9)[49], plan(3)[499]);
        // The documents record seeds. A new version of the random number generator must not change the plans of these
        // seeds.
        assert_eq!(plan(1)[0].random, PINNED);
    }

    /// The first step's own seed, for the seed 1.
    const PINNED: u64 = 6_573_432_028_314_470_756;

    #[test]
    fn step_ids_are_parsed() {
        let id = StepId { seed: 42, shard: 3, step: 17 };
        assert_eq!("42:3:17".parse(), Ok(id));
        assert_eq!(id.to_string(), "42:3:17");
        for text in ["42:10:0", "42:0:50", "42:0", "42:0:0:0", "a:0:0"] {
            assert!(text.parse::<StepId>().is_err(), "{text}");
        }
    }
}
