//! Keeps the page docs/shim-confinement.md equal to the tables of the shim's confinement. With `HUSK_UPDATE_DOCS=1` in
//! the environment, the test writes the page.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use husk_shim::confinement::{capabilities, seccomp};
use husk_vmm::jail::seccomp::Rule;

const HEAD: &str = "# Capabilities and system calls of the shim

The code's tables are the source of this page (`shim/src/confinement/`). After a change of a table,
`HUSK_UPDATE_DOCS=1 cargo test -p husk-shim --test confinement_page` writes the page. A test fails if the page is out of
date. [security.md](security.md#walls-around-the-shim) says what these tables mean for the node.

## Capabilities

| capability | reason |
| --- | --- |
";

const CALLS: &str = "
## System calls

All threads of the shim have the same filter, except the threads of the host view. A call that is not in a table fails
with EPERM, and the shim's log has a line that names the call. With `seccomp = \"log\"` in the configuration, the node's
kernel logs the call and makes it.

The arguments of a call count from 1: `2 = 0x541b` means that the second argument has to be 0x541b, and `3 lacks 0x4`
means that the third argument does not have this bit.
";

const HOST_VIEW: &str = "
### The host view

These threads stay in the host's mount namespace (`shim/src/host_view/`). They may make the calls of the table
\"Threads, memory, time and the async runtime\", and the following calls.

";

fn page() -> String {
    let mut page = HEAD.to_owned();
    for (_, text) in capabilities::KEPT {
        let (name, reason) = text.split_once(": ").unwrap_or_default();
        let _ = writeln!(page, "| {name} | {reason} |");
    }
    page.push_str(CALLS);
    for (title, rules) in seccomp::TABLES {
        let _ = writeln!(page, "\n### {title}\n");
        add_table(&mut page, rules);
    }
    page.push_str(HOST_VIEW);
    add_table(&mut page, seccomp::HOST_VIEW);
    page
}

fn add_table(page: &mut String, rules: &[Rule]) {
    page.push_str("| call | arguments | reason |\n| --- | --- | --- |\n");
    for rule in rules {
        let _ = writeln!(page, "| `{}` | {} | {} |", rule.call.name(), arguments(rule), rule.reason);
    }
}

fn arguments(rule: &Rule) -> String {
    let condition = |condition: &husk_vmm::jail::seccomp::Condition| {
        let argument = condition.argument + 1;
        match condition.mask {
            u32::MAX => format!("{argument} = {:#x}", condition.value),
            mask => format!("{argument} lacks {mask:#x}"),
        }
    };
    rule.when.iter().map(condition).collect::<Vec<_>>().join(", ")
}

#[test]
fn page_is_equal_to_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/shim-confinement.md");
    if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
        fs::write(&path, page()).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == page(), "docs/shim-confinement.md is out of date; run this test with HUSK_UPDATE_DOCS=1");
}
