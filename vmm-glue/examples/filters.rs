//! Prints the seccomp filters of the VMM: with `--markdown` as the table of docs/security.md, otherwise as lines of kind,
//! thread name, call, number and reason, separated by tabs.

use std::collections::BTreeMap;

use husk_vmm::jail::Kind;
use husk_vmm::jail::seccomp::{Rule, rules};

fn main() {
    let markdown = std::env::args().any(|arg| arg == "--markdown");
    if markdown {
        println!("| thread | call | arguments | reason |\n| --- | --- | --- | --- |");
    }
    for kind in Kind::ALL {
        let mut calls: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
        for rule in rules(kind) {
            calls.entry(rule.call.name()).or_default().push(rule);
        }
        for (name, rules) in calls {
            let mut reasons: Vec<&str> = rules.iter().map(|rule| rule.reason).collect();
            reasons.dedup();
            let reasons = reasons.join("; ");
            if markdown {
                println!("| {kind:?} | {name} | {} | {reasons} |", arguments(&rules));
            } else if let Some(rule) = rules.first() {
                println!("{kind:?}\t{}\t{name}\t{}\t{reasons}", kind.thread_name(), rule.call.id());
            }
        }
    }
}

/// Returns the conditions on a call's arguments.
fn arguments(rules: &[&Rule]) -> String {
    if rules.iter().any(|rule| rule.when.is_empty()) {
        return String::new();
    }
    let conditions = rules.iter().flat_map(|rule| rule.when).map(|condition| {
        let argument = condition.argument + 1;
        if condition.mask == u32::MAX {
            format!("{argument} is {:#x}", condition.value)
        } else {
            format!("{argument} lacks {:#x}", condition.mask)
        }
    });
    conditions.collect::<Vec<_>>().join(" or ")
}
