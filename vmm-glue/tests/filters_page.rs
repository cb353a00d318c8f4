//! Keeps the page docs/seccomp.md equal to the tables of the VMM's seccomp filters. With `HUSK_UPDATE_DOCS=1` in the
//! environment, the test writes the page.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use husk_vmm::jail::Kind;
use husk_vmm::jail::seccomp::{Rule, rules};

const HEAD: &str = "# seccomp filters of the VMM

The code's tables are the source of this page (`vmm-glue/src/jail/seccomp/tables.rs`). After a change of a table,
`HUSK_UPDATE_DOCS=1 cargo test -p husk-vmm --test filters_page` writes the page. Without the variable, this test fails
if the page is out of date.

Each thread of the VMM has the filter of its kind. A call that is not in the filter ends the VM, and the shim's error
names the thread and the call. A new thread inherits the filter of the thread that starts it. The control thread starts
the threads of hot-plugged vCPUs and disks, and the threads whose ids are the PIDs of containers. Therefore, the control
thread's filter also contains the calls of these threads. For the same reason, the filter of the virtio-fs supervisor
contains the calls of the virtio-fs threads. The supervisor thread starts additional virtio-fs threads while the others
hang on a file system of the node. It does not read guest memory.

A cell lists the conditions on the arguments of a call, which count from 1: `2 = 0xae80` means that the second argument
is 0xae80, and `3 lacks 0x4` means that the third argument does not have this bit.

";

/// The kinds of threads, each with the title of its column.
const KINDS: [(Kind, &str); 11] = [
    (Kind::Control, "control"),
    (Kind::Saver, "saver"),
    (Kind::Vcpu, "vCPU"),
    (Kind::DeviceLoop, "device loop"),
    (Kind::FileServer, "virtio-fs"),
    (Kind::FileSupervisor, "virtio-fs supervisor"),
    (Kind::LockWaiter, "lock waiter"),
    (Kind::LockOwner, "lock owner"),
    (Kind::Disk, "disk"),
    (Kind::Prefault, "prefault"),
    (Kind::Pid, "pid"),
];

fn page() -> String {
    let mut calls: BTreeMap<&str, Vec<(Kind, &Rule)>> = BTreeMap::new();
    for (kind, _) in KINDS {
        for rule in rules(kind) {
            calls.entry(rule.call.name()).or_default().push((kind, rule));
        }
    }
    let mut page = HEAD.to_owned();
    let titles = KINDS.map(|(_, title)| title).join(" | ");
    let _ = writeln!(page, "| call | {titles} | reason |\n| --- |{} --- |", " --- |".repeat(KINDS.len()));
    for (call, uses) in &calls {
        let cells = KINDS.map(|(kind, _)| {
            let rules: Vec<&Rule> = uses.iter().filter(|(user, _)| *user == kind).map(|(_, rule)| *rule).collect();
            arguments(&rules)
        });
        let mut reasons: Vec<&str> = Vec::new();
        for (_, rule) in uses {
            if !reasons.contains(&rule.reason) {
                reasons.push(rule.reason);
            }
        }
        let _ = writeln!(page, "| `{call}` | {} | {} |", cells.join(" | "), reasons.join("; "));
    }
    let counts = KINDS.map(|(kind, _)| {
        let calls: std::collections::BTreeSet<_> = rules(kind).map(|rule| rule.call).collect();
        calls.len().to_string()
    });
    let _ = writeln!(page, "| number of calls | {} | |", counts.join(" | "));
    page
}

/// Describes the conditions on the arguments of a call. Arguments count from 1.
fn arguments(rules: &[&Rule]) -> String {
    if rules.is_empty() {
        return String::new();
    }
    if rules.iter().any(|rule| rule.when.is_empty()) {
        return "yes".to_owned();
    }
    let conditions = rules.iter().flat_map(|rule| rule.when).map(|condition| {
        let argument = condition.argument + 1;
        match condition.mask {
            u32::MAX => format!("{argument} = {:#x}", condition.value),
            mask => format!("{argument} lacks {mask:#x}"),
        }
    });
    conditions.collect::<Vec<_>>().join(", ")
}

#[test]
fn page_is_equal_to_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/seccomp.md");
    if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
        fs::write(&path, page()).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == page(), "docs/seccomp.md is out of date; run this test with HUSK_UPDATE_DOCS=1 in the environment");
}
