//! Failpoints (`base/src/failpoint.rs`): each action at each place in shim, VMM and agent.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::faults::network;
use super::plan::{Fault, Phase, Step, StepId};
use super::verdict::Report;
use super::{Shard, targets};
use crate::figures::print_line;
use crate::node;

/// The file that has the rule (`RULE_FILE` in `base/src/failpoint.rs`).
const RULE_FILE: &str = "/run/husk-failpoint";
/// The file to which a program writes the name of a failpoint before it takes the action (`REACHED_FILE` in
/// `base/src/failpoint.rs`).
const REACHED_FILE: &str = "/run/husk-failpoint-reached";

/// The failpoint that a victim reaches only if its pod gets a further interface.
const ATTACH_NET: &str = "vmm.attach-net";
/// Time until the VMM attaches a further interface. The shim reads changes of the network at most every 2 s.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(20);

/// All failpoints. A unit test compares this list with the code. The life of a victim reaches each of them: it creates,
/// starts, gets a further interface, executes, stops and removes.
const NAMES: [&str; 26] = [
    "agent.create",
    "agent.created",
    "agent.delete",
    "agent.exec",
    "agent.kill",
    "agent.start",
    "agent.started",
    "shim.create.answered",
    "shim.create.connected",
    "shim.create.prepared",
    "shim.create.reserved",
    "shim.delete",
    "shim.delete.guest",
    "shim.exec.connected",
    "shim.kill",
    "shim.launch.connected",
    "shim.launch.entered",
    "shim.launch.spawned",
    "shim.start",
    "shim.start.answered",
    "vmm.acquire-pid",
    ATTACH_NET,
    "vmm.built",
    "vmm.connect",
    "vmm.create",
    "vmm.resume",
];

/// The actions.
const ACTIONS: [&str; 4] = ["delay", "error", "abort", "hang"];

/// A place and an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failpoint {
    number: usize,
    name: &'static str,
    action: &'static str,
}

/// Returns each action at each place.
pub fn all() -> Vec<Failpoint> {
    let pairs = NAMES.into_iter().flat_map(|name| ACTIONS.map(|action| (name, action)));
    pairs.enumerate().map(|(number, (name, action))| Failpoint { number, name, action }).collect()
}

/// The rule. Dropping it removes the rule.
struct Rule;

impl Rule {
    fn write(failpoint: Failpoint) -> std::io::Result<Self> {
        // A program that runs since before the life still has the file open.
        let _ = fs::remove_file(REACHED_FILE);
        fs::write(RULE_FILE, format!("{}={}\n", failpoint.name, failpoint.action))?;
        Ok(Self)
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        let _ = fs::remove_file(RULE_FILE);
        let _ = fs::remove_file(REACHED_FILE);
    }
}

/// Adds an interface to the pod's network namespace and waits until the VMM attaches it, if this is the life's failpoint.
pub fn add_interface(namespace: &Path) -> Result<(), String> {
    let is_rule = |text: String| text.starts_with(&format!("{ATTACH_NET}="));
    if !fs::read_to_string(RULE_FILE).is_ok_and(is_rule) {
        return Ok(());
    }
    network::add_interface(namespace)?;
    let reached = || has_reached(&fs::read_to_string(REACHED_FILE).unwrap_or_default(), ATTACH_NET).then_some(());
    node::eventually(ATTACH_TIMEOUT, reached).ok_or_else(|| "the VMM did not attach the interface".to_owned())
}

/// Returns whether `text`, the content of [`REACHED_FILE`], has the failpoint.
fn has_reached(text: &str, name: &str) -> bool {
    text.lines().any(|line| line == name)
}

impl Shard<'_> {
    /// Runs one life with a failpoint. The programs of the node must have been built with failpoints.
    pub fn run_failpoint(&mut self, failpoint: Failpoint) -> Report {
        let Failpoint { number, name, action } = failpoint;
        let id = StepId { seed: 0, shard: 0, step: number };
        let step = Step { id, phase: Phase::Exec, fault: Fault::Failpoint, random: number as u64 };
        let rule = Rule::write(failpoint);
        let witness = self.witness.pod.id.clone();
        let over = AtomicBool::new(false);
        let mut report = thread::scope(|scope| {
            if action == "hang" && name.starts_with("shim.") {
                scope.spawn(|| continue_shims(&witness, &over));
            }
            let report = self.run_named(step, &format!("failpoint {number}  {name}={action}"), 1);
            over.store(true, Ordering::Relaxed);
            report
        });
        if let Err(error) = rule {
            report.findings.push(format!("failed to write {RULE_FILE}: {error}"));
        }
        report.struck = has_reached(&fs::read_to_string(REACHED_FILE).unwrap_or_default(), name);
        if !report.struck {
            let unreached = format!("the failpoint {name} was not reached");
            print_line(format_args!("    FOUND {unreached}"));
            report.findings.push(unreached);
        }
        report
    }
}

/// Sends SIGCONT to stopped shims after a while.
fn continue_shims(witness: &str, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_secs(4));
        for pid in targets::of_victim(witness).shims {
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn collect(dir: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                for call in text.split("failpoint!(").skip(1) {
                    names.extend(call.split('"').nth(1).map(str::to_owned));
                }
            }
        }
    }

    #[test]
    fn only_the_whole_name_of_a_failpoint_counts_as_reached() {
        assert!(has_reached("agent.created\nagent.create\n", "agent.create"));
        assert!(!has_reached("agent.created\n", "agent.create") && !has_reached("", "agent.create"));
    }

    #[test]
    fn list_has_all_failpoints_of_the_code() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        if !root.join("shim/src").exists() {
            // The test runs in the test node, too, which has no sources.
            return;
        }
        let mut names = BTreeSet::new();
        for dir in ["shim/src", "vmm-glue/src", "agent/src"] {
            collect(&root.join(dir), &mut names);
        }
        assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), NAMES);
    }
}
