//! Compares the table of waits in docs/reliability.md with the constants of shim, VMM and agent.

#![allow(clippy::unwrap_used, reason = "a panic is a failure of the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A wait: the file and the name of its constant.
type Waits = BTreeMap<(String, String), Limit>;

/// The limit of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit {
    millis: u64,
    /// Whether the node's factor multiplies the limit.
    multiplied: bool,
}

/// The factor of the test node.
const TEST_NODE: u64 = 5;

/// Constants that end in TIMEOUT but limit no wait of the shim, the VMM or the agent.
const NO_WAITS: [&str; 1] = ["SHARE_TIMEOUT"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") && !path.to_string_lossy().ends_with("tests.rs") {
            files.push(path);
        }
    }
}

/// Returns the waits of the source files: the constants whose name ends in TIMEOUT, and the timeouts of calls to the
/// agent.
fn code() -> Waits {
    let mut files = Vec::new();
    for crate_dir in ["base", "shim", "vmm-glue", "agent"] {
        rust_files(&root().join(crate_dir).join("src"), &mut files);
    }
    let mut waits = Waits::new();
    for file in files {
        let path = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        for line in fs::read_to_string(&file).unwrap().lines() {
            let Some((name, limit)) = constant(line) else { continue };
            let is_wait = name.ends_with("TIMEOUT") || ["QUERY", "QUICK", "SLOW"].contains(&name);
            if is_wait && !NO_WAITS.contains(&name) {
                waits.insert((path.clone(), name.to_owned()), limit);
            }
        }
    }
    waits
}

/// Returns the name and the limit of a constant.
fn constant(line: &str) -> Option<(&str, Limit)> {
    let visible = line.trim_start().trim_start_matches("pub").trim_start_matches("(super)").trim_start();
    let (name, rest) = visible.strip_prefix("const ")?.split_once(": ")?;
    let (kind, value) = rest.split_once(" = ")?;
    let multiplied = kind == "BaseTimeout";
    let (unit, number) = value.strip_prefix(kind)?.strip_prefix("::from_")?.strip_suffix(");")?.split_once('(')?;
    let number: u64 = number.replace('_', "").parse().ok()?;
    let millis = match unit {
        "secs" => number * 1000,
        "millis" => number,
        _ => return None,
    };
    (multiplied || kind == "Duration").then_some((name, Limit { millis, multiplied }))
}

/// Returns the milliseconds of a number of seconds with at most one decimal.
fn millis(seconds: &str) -> Option<u64> {
    let (whole, tenths) = seconds.split_once('.').unwrap_or((seconds, "0"));
    Some(whole.parse::<u64>().ok()? * 1000 + tenths.parse::<u64>().ok().filter(|tenths| *tenths < 10)? * 100)
}

fn text() -> String {
    fs::read_to_string(root().join("docs/reliability.md")).unwrap()
}

fn page() -> Waits {
    let text = text();
    let (_, table) = text.split_once("## Waits").unwrap();
    let rows = table.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        let [file, constant, seconds, what, end, ""] = cells[..] else { return None };
        assert!(!what.is_empty() && !end.is_empty(), "{line}");
        let (seconds, multiplied) = seconds.strip_suffix(" × factor").map_or((seconds, false), |base| (base, true));
        Some(((file.to_owned(), constant.to_owned()), Limit { millis: millis(seconds)?, multiplied }))
    });
    rows.collect()
}

#[test]
fn page_lists_every_wait_with_its_limit() {
    let (code, page) = (code(), page());
    assert!(code.len() > 20, "the test finds only {} constants", code.len());
    for (wait, limit) in &code {
        assert_eq!(page.get(wait), Some(limit), "docs/reliability.md has to list {wait:?}");
    }
    for wait in page.keys() {
        assert!(code.contains_key(wait), "docs/reliability.md lists {wait:?}, which the code does not have");
    }
}

#[test]
fn requests_that_end_something_take_at_most_nine_seconds_and_five_times_as_long_in_the_test_node() {
    let (text, code) = (text(), code());
    let table = text.split_once("### Slow nodes").unwrap().1.split_once("\n## ").unwrap().0;
    let mut requests = Vec::new();
    for line in table.lines().filter(|line| line.contains("_TIMEOUT")) {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let ["", request, _, path, hardware, test_node, ""] = cells[..] else { panic!("{line}") };
        let sum = |factor: u64| -> u64 {
            let limit = |name: &str| {
                let mut found = code.iter().filter(|((_, constant), _)| constant == name);
                let (Some((_, limit)), None) = (found.next(), found.next()) else {
                    panic!("{name} is not the name of exactly one wait")
                };
                limit.millis * if limit.multiplied { factor } else { 1 }
            };
            path.split(" + ").map(limit).sum()
        };
        assert_eq!((millis(hardware), millis(test_node)), (Some(sum(1)), Some(sum(TEST_NODE))), "{line}");
        assert!(sum(1) <= 9_000 && sum(TEST_NODE) <= 45_000, "{line}");
        requests.push(request);
    }
    for request in ["Kill with SIGKILL", "Delete", "StopContainer", "StopPodSandbox", "RemovePodSandbox"] {
        assert!(requests.contains(&request), "the table lacks {request}");
    }
}

#[test]
fn orderly_end_with_the_longest_grace_period_ends_before_the_vmm_gives_up() {
    let code = code();
    let secs = |file: &str, name: &str| code[&(file.to_owned(), name.to_owned())].millis / 1000;
    let steps = ["KILL_TIMEOUT", "OUTPUT_TIMEOUT", "FLUSH_TIMEOUT"];
    let steps: u64 = steps.iter().map(|name| secs("shim/src/container/orderly_end.rs", name)).sum();
    let whole = husk_config::check::MAX_SHUTDOWN_GRACE_SECS + steps;
    assert!(whole < secs("vmm-glue/src/process/termination.rs", "END_TIMEOUT"), "{whole}");
}

#[test]
fn action_delete_waits_longer_for_shutdown_than_the_shim_takes() {
    let code = code();
    let steps = [
        ("shim/src/container/create.rs", "CANCEL_TIMEOUT"),
        ("shim/src/sandbox/disks.rs", "DISK_FLUSH_TIMEOUT"),
        ("shim/src/vm/vmm.rs", "VMM_EXIT_TIMEOUT"),
        ("shim/src/sandbox/mod.rs", "REASON_TIMEOUT"),
        ("shim/src/resources/cgroup/remove.rs", "CGROUP_EXIT_TIMEOUT"),
        ("shim/src/systemd/mod.rs", "STOP_TIMEOUT"),
    ];
    for factor in [1, TEST_NODE, 10] {
        let millis = |(file, name): (&str, &str)| {
            let limit = code[&(file.to_owned(), name.to_owned())];
            limit.millis * if limit.multiplied { factor } else { 1 }
        };
        let whole: u64 = steps.into_iter().map(millis).sum();
        assert!(whole < millis(("shim/src/cli/delete.rs", "SHUTDOWN_TIMEOUT")), "{whole}");
    }
}

#[test]
fn output_leaves_the_agent_its_time_for_a_delete_request() {
    let code = code();
    let millis = |file: &str, name: &str| code[&(file.to_owned(), name.to_owned())].millis;
    let escalation = "shim/src/container/escalation.rs";
    let steps =
        millis("shim/src/container/delete.rs", "INIT_OUTPUT_TIMEOUT") + millis(escalation, "AGENT_DELETE_TIMEOUT");
    assert!(steps <= millis(escalation, "DELETE_TIMEOUT"), "{steps}");
}
