//! Compares the seccomp filters of the VMM's threads with the system calls that the threads make in the end-to-end
//! suites.
//!
//! The test node's kernel counts the calls with histogram triggers (Documentation/trace/histogram.rst). The filters log
//! the calls that they do not allow, and do not block these calls. Therefore one run finds all calls that a filter
//! lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::build::cargo;
use crate::{cmd, files, paths, ui};

/// Names of the VMM's threads: one glob for each kind of thread.
const THREADS: [&str; 10] = [
    "husk-vmm",
    "vcpu*",
    "devices",
    "virtio-fs*",
    "fs-supervisor",
    "fs-locks",
    "fs-lock-owner",
    "virtio-blk*",
    "prefault",
    "husk-task",
];
/// Beginnings of the names of the shim's threads. For these threads, xtask reports violations but counts no calls,
/// because threads of runc's shim can have the same names (`containerd-shim`).
const SHIM_THREADS: [&str; 5] = ["containerd-shim", "husk-shim", "launch", "mount", "pod-network"];
/// A test whose name contains this text makes a call that a filter must block. `--syscalls` leaves out these tests,
/// because its filters only log.
pub const NEEDS_FILTERS: &str = "seccomp_violation";
const EVENT: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter";
/// Names of the result files in /out of the test node.
const COUNTS: &str = "syscalls.txt";
const VIOLATIONS: &str = "violations.txt";

/// Shell commands that write the counts and the violations to /out. They are part of the script that the test node
/// runs. Each violation is a record of the audit subsystem with the thread's name and the number of the call
/// (seccomp(2), SECCOMP_RET_LOG).
pub const END: &str = "cat /sys/kernel/tracing/events/raw_syscalls/sys_enter/hist > /out/syscalls.txt\n\
                       dmesg | grep 'type=1326' > /out/violations.txt\n";

/// A rule of a filter, as `cargo run --example filters` prints it.
struct Rule {
    kind: String,
    thread: String,
    call: String,
    number: String,
}

/// Returns the shell commands that make the test node count calls. They are part of the script that the node runs.
pub fn begin() -> String {
    let mut script = String::from(
        "echo 'seccomp = \"log\"' >> /etc/husk/config.toml\n\
         mount -t tracefs tracefs /sys/kernel/tracing\n",
    );
    for thread in THREADS {
        script
            .push_str(&format!("echo 'hist:keys=id:size=1024 if COMM ~ \"{thread}\"' >> {EVENT}/trigger || exit 1\n"));
    }
    script
}

/// Copies the counts and the violations of one boot of the test node to the results directory.
pub fn keep(out: &Path, boot: usize) -> Result<()> {
    let dir = dir()?;
    for name in [COUNTS, VIOLATIONS] {
        let from = out.join(name);
        let to = dir.join(format!("{boot}-{name}"));
        fs::copy(&from, &to).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

/// Prints the rules that no suite needed and the calls that a filter lacks. Returns false if a filter lacks a call.
pub fn report() -> Result<bool> {
    let table = cmd::output(cargo().args(["run", "--quiet", "--package", "husk-vmm", "--example", "filters"]))?;
    let rules: Vec<Rule> = table.lines().filter_map(rule).collect();
    let (mut counts, mut violations) = (BTreeMap::new(), BTreeSet::new());
    for entry in fs::read_dir(dir()?).context("failed to read the counts of system calls")? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        if path.to_string_lossy().ends_with(COUNTS) {
            count(&text, &mut counts);
        } else {
            violations.extend(text.lines().filter_map(violation));
        }
    }
    for Rule { kind, call, .. } in rules.iter().filter(|rule| !is_used(rule, &counts)) {
        ui::say("syscalls", format!("no suite used the rule for {call} in the filter of {kind} threads"));
    }
    for (thread, number) in &violations {
        let name = rules.iter().find(|rule| rule.number == *number).map_or("", |rule| &rule.call);
        ui::say("syscalls", format!("the filter of thread {thread} lacks system call {number} {name}"));
    }
    Ok(violations.is_empty())
}

fn dir() -> Result<PathBuf> {
    let dir = paths::results().join("syscalls");
    files::make_dir(&dir)?;
    Ok(dir)
}

fn rule(line: &str) -> Option<Rule> {
    let mut fields = line.split('\t').map(str::to_owned);
    Some(Rule { kind: fields.next()?, thread: fields.next()?, call: fields.next()?, number: fields.next()? })
}

/// Adds the counts of a `hist` file to `counts`. The key is the thread name (as a glob) and the number of the call.
fn count(text: &str, counts: &mut BTreeMap<(String, String), u64>) {
    let mut thread = String::new();
    for line in text.lines() {
        if line.starts_with("# trigger info:") {
            thread = line.split('"').nth(1).unwrap_or_default().to_owned();
        } else if let Some((key, hits)) = line.strip_prefix("{ id:").and_then(|line| line.split_once("} hitcount:")) {
            let hits = hits.trim().parse().unwrap_or(0);
            *counts.entry((thread.clone(), key.trim().to_owned())).or_default() += hits;
        }
    }
}

/// Returns the thread's name and the number of the call in a record of the audit subsystem. Returns `None` if the
/// thread belongs neither to a VMM nor to a shim.
fn violation(line: &str) -> Option<(String, String)> {
    let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)).map(str::to_owned);
    let thread = field("comm=")?.trim_matches('"').to_owned();
    let number = field("syscall=")?;
    let is_known = |name: &str| thread.starts_with(name.trim_end_matches('*'));
    (THREADS.into_iter().any(is_known) || SHIM_THREADS.into_iter().any(is_known)).then_some((thread, number))
}

fn is_used(rule: &Rule, counts: &BTreeMap<(String, String), u64>) -> bool {
    counts.keys().any(|(thread, number)| thread.trim_end_matches('*') == rule.thread && *number == rule.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_thread_of_the_vmm_is_traced() {
        let text = fs::read_to_string(paths::root().join("vmm-glue/src/jail/kind.rs")).unwrap();
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \""));
        let mut names: Vec<&str> = names.filter_map(|(_, name)| name.strip_suffix("\",")).collect();
        let mut traced: Vec<&str> = THREADS.iter().map(|name| name.trim_end_matches('*')).collect();
        names.sort_unstable();
        traced.sort_unstable();
        assert_eq!(traced, names);
    }

    #[test]
    fn counts_and_violations_are_read_by_thread_and_call() {
        let hist = "# event histogram\n#\n# trigger info: hist:keys=id:vals=hitcount:sort=hitcount:size=1024 \
                    if COMM ~ \"vcpu*\" [active]\n#\n\n{ id:        202 } hitcount:       7\n\
                    { id:         16 } hitcount:      90\n\nTotals:\n    Hits: 97\n";
        let mut counts = BTreeMap::new();
        count(hist, &mut counts);
        count(hist, &mut counts);
        assert_eq!(counts[&("vcpu*".into(), "202".into())], 14);
        let rule = |number: &str| rule(&format!("Vcpu\tvcpu\tx\t{number}\treason")).unwrap();
        assert!(is_used(&rule("16"), &counts) && !is_used(&rule("1"), &counts));
        let record = "[   9.1] audit: type=1326 audit(1.2:3): auid=0 pid=5 comm=\"vcpu0\" exe=\"/x\" sig=0 \
                      arch=c000003e syscall=41 compat=0 ip=0x1 code=0x7ffc0000";
        assert_eq!(violation(record), Some(("vcpu0".into(), "41".into())));
        assert_eq!(violation(&record.replace("vcpu0", "sshd")), None);
    }
}
