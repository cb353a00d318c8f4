//! Guest memory that the host holds for an idle pod, by part of the guest's physical address space.

mod elf;
mod pages;

use std::fs;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use husk_benchmarks::{Report, figure};

use self::elf::Kernel;
use self::pages::Guest;
use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::cri::pods_with_handler;
use crate::vm;

const KERNEL: &str = "/usr/local/share/husk/vmlinux";
const INITRD: &str = "/usr/local/share/husk/initrd.cpio";
/// RAM of the guests. It is the default for pods without a limit.
const RAM: u64 = 1024 << 20;
const CONFIG: &str = "default_memory_mib = 1024\n";
/// How long the pods are idle before they are measured.
const IDLE: Duration = Duration::from_secs(10);
/// Length of the memory at the end of RAM in which the kernel makes its first allocations, without the array of `struct
/// page` (`vmm-glue/src/boot/kernel.rs`).
const FIRST_ALLOCATIONS: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// A part of the guest's physical address space. It may have several ranges.
struct Part {
    name: &'static str,
    ranges: Vec<Range<u64>>,
}

/// Measures one new pod for each run.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    let kernel = Kernel::parse(fs::read(KERNEL).unwrap());
    let parts = parts(&kernel, fs::metadata(INITRD).unwrap().len());
    let runs = options.runs.unwrap_or(3);
    let mut report = Report::new("guest-memory").with("runs", runs).with("ram", RAM);
    let mut quantities = Vec::new();
    for Part { name, ranges } in &parts {
        let size = figure(ranges.iter().map(|range| range.end - range.start).sum::<u64>() as f64 / (1 << 20) as f64);
        quantities
            .extend(["anonymous", "shared"].map(|kind| Quantity::lower(format!("{name} ({size} MiB), {kind}"), "MiB")));
    }
    pods_with_handler("bench-guest-memory", "husk", |pods| {
        interleave(&mut report, runs, &names(&Variant::HUSK), &quantities, |index, _| {
            let _config = Variant::HUSK[index].configure_with(CONFIG);
            let pod = pods.pod();
            pod.sleeper();
            thread::sleep(IDLE);
            let [vmm] = vm::vmm_pids_of(&pod.id)[..] else { panic!("expected exactly one VMM of {}", pod.id) };
            let guest = Guest::find(vmm, &kernel);
            let values = parts.iter().flat_map(|part| {
                let held = part.ranges.iter().map(|range| guest.held(range.clone()));
                let (anonymous, shared) = held.fold((0, 0), |sum, held| (sum.0 + held.0, sum.1 + held.1));
                [anonymous, shared].map(|pages| (pages * PAGE) as f64 / (1 << 20) as f64)
            });
            let values = values.collect();
            pod.remove();
            values
        });
    });
    report
}

/// Returns the parts. Together, they cover the RAM.
fn parts(kernel: &Kernel, initrd: u64) -> Vec<Part> {
    let image = kernel.image();
    let initrd = image.end..(image.end + initrd).next_multiple_of(PAGE);
    let end = RAM - RAM / 64 - FIRST_ALLOCATIONS;
    let single = |(name, range)| Part { name, ranges: std::iter::once(range).collect() };
    let before = [("below the kernel", 0..image.start)];
    let after =
        [("initrd", initrd.clone()), ("struct pages and first allocations", end..RAM), ("rest", initrd.end..end)];
    let sections = kernel.sections().map(|(name, ranges)| Part { name, ranges });
    before.into_iter().map(single).chain(sections).chain(after.into_iter().map(single)).collect()
}
