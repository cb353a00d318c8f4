//! Duration of RunPodSandbox, and the time until the first line of a container's log.

use std::thread;
use std::time::{Duration, Instant};

use husk_benchmarks::Report;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::cri::pods_with_handler;

/// Interval at which the log is read.
const POLL: Duration = Duration::from_millis(2);

/// Measures pods of each variant.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    let runs = options.runs.unwrap_or(7);
    let mut report = Report::new("sandbox").with("runs", runs);
    let quantities = [
        Quantity::lower("RunPodSandbox", "s"),
        Quantity::lower("CreateContainer until the first line of the log", "s"),
    ];
    pods_with_handler("bench-sandbox", "husk", |pods| {
        interleave(&mut report, runs, &names(&Variant::COMPARED), &quantities, |index, _| {
            let variant = Variant::COMPARED[index];
            let _config = variant.configure();
            let config = pods.config();
            let begin = Instant::now();
            let pod = pods.run_with_handler(variant.handler(), config);
            let sandbox = begin.elapsed();
            let config = pod.sh("echo up; exec sleep 100000");
            let begin = Instant::now();
            let container = pod.start(&config);
            while !container.log().contains("up") {
                assert!(begin.elapsed() < crate::command::TIMEOUT, "the container has written no line");
                thread::sleep(POLL);
            }
            let first_line = begin.elapsed();
            pod.remove();
            vec![sandbox.as_secs_f64(), first_line.as_secs_f64()]
        });
    });
    report
}
