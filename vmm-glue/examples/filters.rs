//! Prints the rules of the VMM's seccomp filters: kind of thread, thread name, and the system call's name and
//! number, separated by tabs. `cargo xtask test --e2e --syscalls` compares the rules with the system calls that the
//! suites make.

use std::collections::BTreeMap;

use husk_vmm::jail::Kind;
use husk_vmm::jail::seccomp::rules;

fn main() {
    for kind in Kind::ALL {
        let calls: BTreeMap<&str, i32> = rules(kind).map(|rule| (rule.call.name(), rule.call.id())).collect();
        for (name, number) in calls {
            println!("{kind:?}\t{}\t{name}\t{number}", kind.thread_name());
        }
    }
}
