//! Runs a test in a process of its own, and counts what its scenarios leave in the process.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use tokio::runtime::{Builder, Handle};

/// Set in the process of a test.
const MARK: &str = "HUSK_MODEL_TEST";

/// Runs the current test in a process and a mount namespace of its own. The state directories of the shim are then on a
/// file system of the test. The shim's blocking threads see the same mounts as the test. The test needs root.
pub fn in_own_process(test: impl FnOnce()) {
    if std::env::var_os(MARK).is_some() {
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
        return test();
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "slave"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    print!("{text}");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs scenarios, and checks that each leaves as many tasks and descriptors as the first one. Continues after a
/// failure, and reports all failures at the end.
#[derive(Default)]
pub struct Scenarios {
    /// The tasks and the descriptors after the first scenario.
    first: Option<(usize, usize)>,
    count: usize,
    /// The scenarios by the text of their failure.
    failures: BTreeMap<String, Vec<String>>,
}

impl Scenarios {
    /// Runs a scenario with a paused clock in a runtime of its own. Returns `None` if it fails.
    pub fn run<T>(&mut self, name: String, scenario: impl Future<Output = T>) -> Option<T> {
        self.count += 1;
        let result = catch_unwind(AssertUnwindSafe(|| {
            let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let result = scenario.await;
                // Lets the cancelled tasks end.
                tokio::time::sleep(Duration::from_secs(600)).await;
                (result, Handle::current().metrics().num_alive_tasks())
            })
        }));
        let left = descriptors();
        let failure = match result {
            Ok((result, tasks)) => {
                let first = *self.first.get_or_insert((tasks, left));
                if tasks <= first.0 && left <= first.1 {
                    return Some(result);
                }
                format!("tasks and descriptors grow from {first:?} to {:?}", (tasks, left))
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
            }
        };
        // A failed scenario may leave descriptors.
        self.first = self.first.map(|(tasks, _)| (tasks, descriptors()));
        self.failures.entry(failure).or_default().push(name);
        None
    }

    /// Returns a set of scenarios that must leave as little as the first one of this set.
    pub fn again(&self) -> Self {
        // A scenario that has failed may have left descriptors.
        Self { first: self.first.map(|(tasks, _)| (tasks, descriptors())), ..Self::default() }
    }

    /// Returns the last failure.
    pub fn failure(&self) -> Option<&str> {
        self.failures.keys().next_back().map(String::as_str)
    }

    /// Panics if a scenario has failed.
    pub fn end(self) {
        let report = |(failure, names): (&String, &Vec<String>)| {
            let names: Vec<_> = names.iter().take(8).map(String::as_str).collect();
            format!("{failure}\n  in: {}", names.join("\n      "))
        };
        let failed: usize = self.failures.values().map(Vec::len).sum();
        println!("{failed} of {} scenarios failed", self.count);
        let text: Vec<_> = self.failures.iter().map(report).collect();
        assert!(text.is_empty(), "{}", text.join("\n"));
    }
}
