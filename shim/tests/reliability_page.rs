//! Compares the table of waits in docs/reliability.md with the constants of shim, VMM and agent.

#![allow(clippy::unwrap_used, reason = "a panic is a failure of the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A wait: the file and the name of its constant. The value is the number of seconds.
type Waits = BTreeMap<(String, String), u64>;

/// Constants that end in TIMEOUT but limit no wait of the shim, the VMM or the agent.
const NO_WAITS: [&str; 1] = ["CACHE_TIMEOUT"];

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
    for crate_dir in ["shim", "vmm-glue", "agent"] {
        rust_files(&root().join(crate_dir).join("src"), &mut files);
    }
    let mut waits = Waits::new();
    for file in files {
        let path = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        for line in fs::read_to_string(&file).unwrap().lines() {
            let Some((name, value)) = line
                .trim_start()
                .trim_start_matches("pub ")
                .strip_prefix("const ")
                .and_then(|rest| rest.split_once(": Duration = Duration::from_secs("))
            else {
                continue;
            };
            let is_wait = name.ends_with("TIMEOUT") || ["QUERY", "QUICK", "SLOW"].contains(&name);
            if is_wait && !NO_WAITS.contains(&name) {
                let seconds = value.split(')').next().unwrap().parse().unwrap();
                waits.insert((path.clone(), name.to_owned()), seconds);
            }
        }
    }
    waits
}

fn page() -> Waits {
    let text = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let (_, table) = text.split_once("## Waits").unwrap();
    let rows = table.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        let [file, constant, seconds, what, end, ""] = cells[..] else { return None };
        assert!(!what.is_empty() && !end.is_empty(), "{line}");
        Some(((file.to_owned(), constant.to_owned()), seconds.parse().ok()?))
    });
    rows.collect()
}

#[test]
fn page_lists_every_wait_with_its_limit() {
    let (code, page) = (code(), page());
    assert!(code.len() > 20, "the test finds only {} constants", code.len());
    for (wait, seconds) in &code {
        assert_eq!(page.get(wait), Some(seconds), "docs/reliability.md has to list {wait:?}");
    }
    for wait in page.keys() {
        assert!(code.contains_key(wait), "docs/reliability.md lists {wait:?}, which the code does not have");
    }
}
