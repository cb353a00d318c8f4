//! Duration of many starts at once. Checks the exit codes, and that nothing is left.

use std::time::{Duration, Instant};

use husk_benchmarks::Report;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::command::{Input, Running};
use crate::leftovers::Snapshot;
use crate::{BUSYBOX, node};

/// Timeout of the containers. With 50 of them, an emulated node needs minutes.
const LIMIT: Duration = Duration::from_secs(900);
/// Timeout for leftovers to disappear.
const SETTLE: Duration = Duration::from_secs(60);
/// Timeouts of the shims. A guest boots slowly beside 50 others.
const TIMEOUTS: &str = "start_timeout_secs = 300\n";

/// Runs the containers of each variant.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    node::need_image(BUSYBOX);
    let (runs, count) = (options.runs.unwrap_or(3), options.at_once);
    let mut report = Report::new("burst").with("runs", runs).with("at once", count);
    let before = Snapshot::take();
    let mut failures = Vec::new();
    let quantity = Quantity::lower(format!("{count} × `ctr run` at once"), "s");
    interleave(&mut report, runs, &names(&Variant::COMPARED), &[quantity], |index, round| {
        let variant = Variant::COMPARED[index];
        let seconds = burst(variant, count, round, &mut failures);
        if let Err(left) = before.compare_until_equal(SETTLE) {
            failures.push(format!("{} round {round} leaves something on the node:\n{left}", variant.name()));
        }
        vec![seconds]
    });
    report.failures = failures;
    report
}

/// Runs `count` containers at once, and returns the duration in seconds.
fn burst(variant: Variant, count: usize, round: u32, failures: &mut Vec<String>) -> f64 {
    let _config = variant.configure_with(TIMEOUTS);
    let begin = Instant::now();
    let running: Vec<(i32, Running)> = (0..count)
        .map(|number| {
            let (id, code) = (format!("bench-burst-{round}-{number}"), exit_code(number));
            let command = variant.ctr_run(&id, &["sh", "-c", &format!("exit {code}")]);
            (code, Running::start(command, Input::Null))
        })
        .collect();
    for (code, running) in running {
        let output = running.wait_within(LIMIT);
        if output.code != code {
            let name = variant.name();
            failures.push(format!("{name} round {round}: expected exit code {code}\n{}", output.describe()));
        }
    }
    begin.elapsed().as_secs_f64()
}

/// Returns the exit code that a container is to have. The code 1 is also that of `ctr` if it fails.
fn exit_code(number: usize) -> i32 {
    i32::try_from(number % 100).unwrap() + 2
}
