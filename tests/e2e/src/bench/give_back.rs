//! Part of freed guest memory that the host has again after ten seconds.

use std::thread;
use std::time::Duration;

use husk_benchmarks::Report;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::cri::pod::need_image;
use crate::cri::pods_with_handler;
use crate::{PYTHON, node};

/// Allocates memory, and frees it when the file `/free` exists.
const PROGRAM: &str = "import os, sys, time
print('up', flush=True)
while not os.path.exists('/allocate'):
    time.sleep(0.1)
memory = bytearray(MIB << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
print('allocated', flush=True)
while not os.path.exists('/free'):
    time.sleep(0.1)
del memory
print('freed', flush=True)
time.sleep(100000)";

/// How long the guest has for giving memory back.
const WAIT: Duration = Duration::from_secs(10);

/// Measures one new pod for each run.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    need_image(PYTHON);
    let (runs, mib) = (options.runs.unwrap_or(3), options.mib.unwrap_or(256));
    let mut report = Report::new("give-back").with("runs", runs).with("mib", mib);
    let quantities = [
        Quantity::lower("decrease of MemAvailable after the allocation", "MiB"),
        Quantity::higher("part of it that is available 10 s after the memory was freed", "%"),
    ];
    pods_with_handler("bench-give-back", "husk", |pods| {
        interleave(&mut report, runs, &names(&Variant::COMPARED), &quantities, |index, _| {
            let variant = Variant::COMPARED[index];
            let _config = variant.configure();
            let pod = pods.run_with_handler(variant.handler(), pods.config());
            let container = pod.start(&pod.python(&PROGRAM.replace("MIB", &mib.to_string())));
            container.wait_for("up");
            node::wait_for_stable_memory();
            let before = available();
            container.sh("touch /allocate");
            container.wait_for("allocated");
            let allocated = available();
            container.sh("touch /free");
            container.wait_for("freed");
            thread::sleep(WAIT);
            let after = available();
            pod.remove();
            let taken = before - allocated;
            vec![taken, 100.0 * (after - allocated) / taken]
        });
    });
    report
}

/// Returns the memory that the node has available without its caches, in MiB.
fn available() -> f64 {
    node::drop_caches();
    node::meminfo("MemAvailable") / (1 << 20) as f64
}
