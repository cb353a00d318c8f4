//! Hostile guests: attacks from inside a VM on every device and protocol of the VMM.
//!
//! The attacker is machine code without a kernel. Each attack runs in a separate VM. This program spawns, jails and
//! controls the VMM process as the shim does. The program prints a table of the attacks, and fails unless each attack
//! meets these conditions:
//!
//! - The VMM survives, serves a valid request to the attacked device, and then answers requests of the shim. Some
//!   attacks may or must end the VM instead (`Expect`). In this case, the VMM reports the end of the VM.
//! - No file outside the share changes. The VMM leaves no process and no core dump. No thread of the VMM panics.
//! - The VMM writes few lines to its log.
//!
//! The program needs root and KVM, as the shim does. Each argument selects the attacks whose names contain the
//! argument. With the argument `--vhost-net`, the program runs the attacks on an interface whose queues vhost-net
//! serves, and needs `/dev/vhost-net`. The suite `husk_hostile` runs these attacks in the test node.

#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by a panic")]

mod assembler;
mod attacks;
#[allow(dead_code, missing_docs, reason = "the module belongs to the library's tests")]
#[path = "../../src/virtio/testing/fuse.rs"]
mod fuse;
mod guest;
mod machine;
mod traffic;
#[expect(clippy::unwrap_used, reason = "a test fails by a panic")]
#[path = "../../src/virtio/fs/test_tree.rs"]
mod tree;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_vmm::client::{ARGV0, CONTROL_FD};

use crate::attacks::{Attack, Expect};
use crate::guest::{Device, Guest};
use crate::machine::{End, Host, Node, Outcome};

/// Maximum number of log lines of an attack: the bursts of several call sites.
const LOG_LINES: usize = 150;
/// Maximum number of further log lines per second.
const LOG_RATE: usize = 20;

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        // SAFETY: only `spawn` starts the program under this name, and `spawn` has put the control socket at
        // CONTROL_FD. Nothing else owns that fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let vhost = std::env::args().any(|argument| argument == "--vhost-net");
    let attacks = if vhost { attacks::all_on_vhost_net() } else { attacks::all() };
    let selected = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let node = Node::new();
    let surroundings = node.surroundings();
    let mut failures = Vec::new();
    println!("| attack | result | log lines |");
    println!("| --- | --- | --- |");
    for attack in attacks.into_iter().filter(|attack| selected(attack.name)) {
        let mut results: Vec<(String, Vec<&str>)> = Vec::new();
        let mut lines = 0;
        for device in &attack.devices {
            let outcome = run(&node, &attack, device);
            lines = lines.max(outcome.log.len());
            let mut faults = faults(&attack, &outcome);
            faults.extend(tree::differences(&surroundings, &node.surroundings()));
            faults.extend(machine::leftovers().into_iter().map(|process| format!("the VMM left process {process}")));
            for fault in faults {
                failures.push(format!("{} on {}: {fault}", attack.name, device.name));
            }
            let result = describe(&outcome);
            match results.iter_mut().find(|(known, _)| *known == result) {
                Some((_, devices)) => devices.push(device.name),
                None => results.push((result, vec![device.name])),
            }
        }
        let cells: Vec<_> =
            results.into_iter().map(|(result, devices)| format!("{}: {result}", devices.join(", "))).collect();
        println!("| {} | {} | {lines} |", attack.name, cells.join("; "));
    }
    if !vhost {
        // The vhost-net attacks run in the test node, which lacks the document. Therefore, this run checks both tables.
        failures.extend(document_differences("## Attacks from inside of a VM\n", &attacks::all()));
        failures.extend(document_differences("### Attacks on vhost-net\n", &attacks::all_on_vhost_net()));
    }
    for failure in &failures {
        println!("FAILED: {failure}");
    }
    println!("{} failures", failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Compares the names of attacks with the rows of a table in docs/security.md.
fn document_differences(section: &str, attacks: &[Attack]) -> Vec<String> {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md");
    let document = std::fs::read_to_string(document).expect("read docs/security.md");
    let section = document.split_once(section).map_or("", |(_, section)| section);
    let section = section.split("\n##").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()).skip(2);
    let documented: Vec<&str> = rows.collect();
    let missing = attacks.iter().filter(|attack| !documented.contains(&attack.name));
    let unknown = documented.iter().filter(|name| !attacks.iter().any(|attack| attack.name == **name));
    let missing = missing.map(|attack| format!("docs/security.md lacks the row {:?}", attack.name));
    missing.chain(unknown.map(|name| format!("docs/security.md has the unknown row {name:?}"))).collect()
}

fn run(node: &Node, attack: &Attack, device: &Device) -> Outcome {
    let mut guest = Guest::new();
    if device.vhost {
        // An attack that configures the device itself begins while vhost-net serves the queues.
        guest.start(device);
    }
    (attack.build)(&mut guest, device);
    if !matches!(attack.expect, Expect::Ends(_)) {
        guest.check(device);
    }
    node.run(guest, Host { vhost: device.vhost, ..attack.host })
}

/// Returns the differences between an outcome and what the attack expects.
fn faults(attack: &Attack, outcome: &Outcome) -> Vec<String> {
    let mut faults = Vec::new();
    match (attack.expect, &outcome.end) {
        (Expect::Survives | Expect::Either(_), End::Survived) => {}
        (Expect::Ends(text) | Expect::Either(text), End::Ended(reason)) if reason.contains(text) => {}
        (expected, end) => faults.push(format!("the attack ended with {end:?}, but must end with {expected:?}")),
    }
    let panics = outcome.log.iter().filter(|line| line.contains("panicked"));
    faults.extend(panics.map(|line| format!("a thread panicked: {line}")));
    let no_vhost = outcome.log.iter().filter(|line| line.contains("failed to start vhost-net"));
    faults.extend(no_vhost.map(|line| format!("vhost-net did not start: {line}")));
    let limit = LOG_LINES + LOG_RATE * (outcome.duration.as_secs() as usize + 1);
    if outcome.log.len() > limit {
        let lines = outcome.log.iter().take(3).cloned().collect::<Vec<_>>().join("\n");
        let (number, duration) = (outcome.log.len(), outcome.duration);
        faults.push(format!(
            "the VMM logged {number} lines in {duration:?}, but at most {limit} are allowed; for example:\n{lines}"
        ));
    }
    if outcome.notices > attacks::NOTICES {
        faults.push(format!("the shim got {} notices, but at most {} are allowed", outcome.notices, attacks::NOTICES));
    }
    faults
}

fn describe(outcome: &Outcome) -> String {
    let end = match &outcome.end {
        End::Survived => "still works".to_owned(),
        // The thread that ends the VM can differ from run to run. Therefore, the table does not show its name.
        End::Ended(reason) if reason.starts_with("thread ") => {
            format!("the VM ends: a thread {}", reason.splitn(3, ' ').last().unwrap_or_default())
        }
        End::Ended(reason) => format!("the VM ends: {reason}"),
        End::Died(status) => format!("the VMM dies: {status}"),
        End::Hung(what) => format!("the VMM hangs: {what}"),
    };
    if outcome.reaction.is_empty() { end } else { format!("{}, {end}", outcome.reaction) }
}
