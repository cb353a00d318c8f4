//! The faults: one file for each class. A fault is injected (armed) once, and ended (healed) once.

pub mod callers;
pub mod file_systems;
pub mod guest;
pub mod limits;
pub mod network;
pub mod processes;
pub mod stdio;
pub mod time;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::plan::{Class, Fault, Phase};
use super::targets::{self, Targets};
use super::victim::{Equipment, Victim};
use crate::node;

/// Timeout for the appearance of the process into which a fault is injected, while the pod is being made.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The fault ends after this time. Afterwards, requests that wait because of the fault get their whole budget.
    Short(Duration),
    /// The fault lasts until the pod has been removed.
    Life,
}

/// A fault that was injected.
pub struct Armed {
    /// How long it lasts.
    pub hold: Hold,
    heal: Option<Box<dyn FnOnce()>>,
}

impl Armed {
    /// A fault that needs no healing.
    pub fn done() -> Self {
        Self { hold: Hold::Short(Duration::ZERO), heal: None }
    }

    /// A fault that `heal` ends.
    pub fn new(hold: Hold, heal: impl FnOnce() + 'static) -> Self {
        Self { hold, heal: Some(Box::new(heal)) }
    }

    /// Ends the fault.
    pub fn heal(&mut self) {
        if let Some(heal) = self.heal.take() {
            heal();
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        self.heal();
    }
}

/// The pods and processes into which a fault can be injected.
pub struct Field<'a> {
    /// The victim.
    pub victim: &'a Victim,
    /// The id of the victim's sandbox, if containerd has told it.
    pub pod: Option<&'a str>,
    /// The id of the victim's container, if containerd has told it.
    pub container: Option<&'a str>,
    /// The id of the witness's sandbox.
    pub witness: &'a str,
    /// The network namespaces that existed before the victim.
    pub namespaces: &'a [PathBuf],
    /// The sockets of shims that existed before the victim.
    pub sockets: &'a [PathBuf],
    /// Timeout for the appearance of what the fault needs. In most phases, the pod has what it will ever have.
    pub appears: Duration,
    /// The step's random numbers.
    pub random: &'a mut Rng,
}

/// Returns how long a fault in this phase waits for the appearance of what it needs.
pub fn appearance_timeout(phase: Phase) -> Duration {
    if phase == Phase::RunPodSandbox { APPEAR_TIMEOUT } else { Duration::ZERO }
}

impl Field<'_> {
    /// Waits until the victim has a process of one kind. Returns its pid.
    fn process(&self, what: &str, of: impl Fn(&Targets) -> Option<i32>) -> Result<i32, String> {
        node::eventually(self.appears, || of(&targets::of_victim(self.witness))).ok_or_else(|| format!("no {what}"))
    }

    fn shim(&self) -> Result<i32, String> {
        self.process("shim", |targets| targets.shims.first().copied())
    }

    fn vmm(&self) -> Result<i32, String> {
        self.process("VMM", |targets| targets.vmms.first().copied())
    }

    fn launcher(&self) -> Result<i32, String> {
        self.process("launcher", |targets| targets.launchers.first().copied())
    }

    /// Waits until the victim has a cgroup. Returns its directory.
    fn cgroup(&self) -> Result<PathBuf, String> {
        let find = || targets::of_victim(self.witness).vmms.first().and_then(|pid| targets::cgroup(*pid));
        node::eventually(self.appears, find).ok_or_else(|| "no cgroup".to_owned())
    }

    /// Waits until the victim has a network namespace. Returns its path.
    fn namespace(&self) -> Result<PathBuf, String> {
        let find = || targets::network_namespaces().into_iter().find(|path| !self.namespaces.contains(path));
        node::eventually(self.appears, find).ok_or_else(|| "no network namespace".to_owned())
    }

    /// Returns a random time of some seconds.
    fn seconds(&mut self, least: f64, most: f64) -> Duration {
        Duration::from_secs_f64(least + (most - least) * self.random.f64())
    }
}

/// Returns what the fault needs in the victim's container.
pub fn equipment(fault: Fault) -> Equipment {
    Equipment { host_path: file_systems::host_path(fault), resources: guest::resources(fault) }
}

/// Injects the fault.
///
/// # Errors
/// Why the fault cannot be injected, for example because the process has already ended.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    match fault.class() {
        Class::Processes => processes::arm(fault, field),
        Class::Callers => callers::arm(fault),
        Class::Guest => guest::arm(fault, field),
        Class::Limits => limits::arm(fault, field),
        Class::FileSystems => file_systems::arm(fault),
        Class::Network => network::arm(fault, field),
        Class::Stdio => stdio::arm(fault, field),
        Class::Time => time::arm(fault, field),
    }
}

/// Writes a file of the kernel, and returns a fault that restores its content.
fn write_until(path: PathBuf, value: &str, hold: Hold) -> Result<Armed, String> {
    let fail = |error| format!("{}: {error}", path.display());
    let old = std::fs::read_to_string(&path).map_err(fail)?;
    std::fs::write(&path, value).map_err(fail)?;
    Ok(Armed::new(hold, move || {
        // The file disappears with the pod's cgroup.
        let _ = std::fs::write(path, old.trim());
    }))
}

/// Waits until `over` returns true, at most for `limit`.
pub fn sleep_until(limit: Duration, mut over: impl FnMut() -> bool) {
    let begin = Instant::now();
    while begin.elapsed() < limit && !over() {
        std::thread::sleep(Duration::from_millis(20).min(limit));
    }
}
