//! Throughput of a command's output through the CRI's Exec.

use std::time::Instant;

use husk_benchmarks::Report;
use serde_json::json;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::cri::pod::pods_with_handler;
use crate::cri::stream::{Stream, channel};
use crate::cri::{PodContainer, call};

const VARIANTS: [Variant; 2] = [Variant::Runc, Variant::Boot];

/// Creates one pod for each variant. Measures the throughput of a container's output in each pod, in alternating runs.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    let (runs, mib) = (options.runs.unwrap_or(5), options.mib.unwrap_or(128));
    let mut report = Report::new("exec").with("runs", runs).with("mib", mib);
    pods_with_handler("bench-exec", "husk", |pods| {
        let containers = VARIANTS.map(|variant| {
            let _config = variant.configure();
            pods.run_with_handler(variant.handler(), pods.config()).sleeper()
        });
        let quantity = Quantity::higher("output of a command", "MiB/s");
        interleave(&mut report, runs, &names(&VARIANTS), &[quantity], |index, _| {
            vec![throughput(&containers[index], mib)]
        });
    });
    report
}

/// Returns the throughput of one run, in MiB/s.
fn throughput(container: &PodContainer, mib: usize) -> f64 {
    let command = ["dd", "if=/dev/zero", "bs=1M", &format!("count={mib}")];
    let request = json!({ "container_id": container.id, "cmd": command, "stdout": true });
    let answer = call("Exec", &request);
    let begin = Instant::now();
    let mut stream = Stream::connect(answer["url"].as_str().unwrap());
    let mut bytes = 0;
    while let Some((from, data)) = stream.receive() {
        if from == channel::STDOUT {
            bytes += data.len();
        }
    }
    assert_eq!(bytes, mib << 20, "the command's output has a wrong number of bytes");
    mib as f64 / begin.elapsed().as_secs_f64()
}
