//! Duration of `ctr run --rm … true` with each runtime, the steps of Husk's start, and the memory of an idle container.

use husk_benchmarks::{Report, Table, figure, median};

use super::timelines::{self, step_times, timeline};
use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::command::{Input, Running, ctr};
use crate::{BUSYBOX, node, vm};

/// Memory use of an idle container, in KiB.
#[derive(Debug, Clone, Copy, Default)]
struct MemoryUse {
    /// PSS of the VMM, without guest memory.
    vmm: u64,
    /// PSS of guest memory.
    guest: u64,
    /// PSS of the shim.
    shim: u64,
    /// PSS of the shim's launcher.
    launcher: u64,
}

/// Measures the starts.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    node::need_image(BUSYBOX);
    let (runs, variants) = (options.runs.unwrap_or(7), &options.variants);
    let mut report = Report::new("start").with("runs", runs);
    let mut starts: Vec<(Variant, Vec<_>)> = Vec::new();
    starts.extend(variants.iter().filter(|one| Variant::HUSK.contains(one)).map(|one| (*one, Vec::new())));
    let quantity = Quantity::lower("`ctr run --rm … true`", "s");
    interleave(&mut report, runs, &names(variants), &[quantity], |index, round| {
        let variant = variants[index];
        let id = format!("bench-{}-{round}", variant.name().replace(' ', "-"));
        let began = timelines::now();
        let seconds = variant.run_true(&id);
        if let Some((_, starts)) = starts.iter_mut().find(|(one, _)| *one == variant)
            && round > 0
        {
            starts.push((began, timeline(&id)));
        }
        vec![seconds]
    });
    let memory: Vec<_> =
        variants.iter().filter(|one| one.is_husk()).map(|one| (one.name(), measure_memory(*one))).collect();
    report.notes.extend(jail_cost(&report, &memory));
    report.tables.extend(starts.iter().map(|(variant, starts)| timelines::table(variant.name(), &step_times(starts))));
    if !memory.is_empty() {
        report.tables.push(memory_table(&memory));
    }
    report
}

/// Measures the memory use of an idle container that runs with a build of Husk.
fn measure_memory(variant: Variant) -> MemoryUse {
    let id = "bench-weight";
    let _config = variant.configure();
    let mut running = Running::start(variant.ctr_run(id, &["sh", "-c", "echo up; exec sleep 1000"]), Input::Null);
    running.wait_for("up");
    let only = |pids: Vec<i32>| {
        let [pid] = pids[..] else { panic!("expected exactly one process of {id}, found {pids:?}") };
        vm::memory(pid).unwrap()
    };
    let (vmm, shim, launcher) = (only(vm::vmm_pids_of(id)), only(vm::shim_pids_of(id)), only(vm::launcher_pids_of(id)));
    Running::start(ctr(&["tasks", "kill", "-s", "KILL", id]), Input::Null).wait();
    running.wait();
    let all = |memory: vm::Memory| memory.other + memory.guest;
    MemoryUse { vmm: vmm.other, guest: vmm.guest, shim: all(shim), launcher: all(launcher) }
}

fn memory_table(memory: &[(&str, MemoryUse)]) -> Table {
    let row = |name: &str, kib: fn(&MemoryUse) -> u64| {
        let cells = memory.iter().map(|(_, one)| format!("{} MiB", figure(kib(one) as f64 / 1024.0)));
        std::iter::once(name.to_owned()).chain(cells).collect()
    };
    let columns = std::iter::once("PSS of an idle container").chain(memory.iter().map(|(name, _)| *name));
    Table {
        columns: columns.map(str::to_owned).collect(),
        rows: vec![
            row("VMM process, without guest memory", |one| one.vmm),
            row("shim", |one| one.shim),
            row("launcher", |one| one.launcher),
            row("guest memory touched", |one| one.guest),
        ],
    }
}

/// Describes the cost of the jail: what Husk with the jail needs in addition to a build without the jail. Returns
/// `None` if one of the two was not measured.
///
/// The difference in time is the median over the rounds, because the two starts of a round run one after the other.
fn jail_cost(report: &Report, memory: &[(&str, MemoryUse)]) -> Option<String> {
    let seconds = |name: &str| {
        let mut series = report.measurements.iter().flat_map(|one| &one.series);
        series.find(|one| one.variant == name).map(|one| &one.values)
    };
    let (jailed, free) = (Variant::Boot.name(), Variant::Unjailed.name());
    let (with, without) = (seconds(jailed)?, seconds(free)?);
    let differences: Vec<f64> = with.iter().zip(without).map(|(with, without)| with - without).collect();
    let kib = |name: &str| {
        let (_, memory) = memory.iter().find(|(one, _)| *one == name)?;
        Some((memory.vmm + memory.shim + memory.launcher) as f64)
    };
    Some(format!(
        "The jail adds {:+.1} % to the median start, and {:+.2} MiB to the memory of a pod.",
        100.0 * median(&differences) / median(without),
        (kib(jailed)? - kib(free)?) / 1024.0
    ))
}

#[cfg(test)]
mod tests {
    use husk_benchmarks::{Better, Measurement};

    use super::*;

    #[test]
    fn jail_cost_compares_the_runs_of_each_round() {
        let series = [("husk boot", vec![1.02, 2.02, 9.0]), ("unjailed", vec![1.0, 2.0, 3.0])];
        let report = |count| Report {
            measurements: vec![Measurement::new("start", "s", Better::Lower, series[..count].iter().cloned())],
            ..Report::new("start")
        };
        let memory = |vmm| MemoryUse { vmm, shim: 3072, launcher: 512, guest: 80_000 };
        let memory = [("husk boot", memory(2048)), ("unjailed", memory(1536))];
        assert_eq!(
            jail_cost(&report(2), &memory).unwrap(),
            "The jail adds +1.0 % to the median start, and +0.50 MiB to the memory of a pod."
        );
        assert_eq!(jail_cost(&report(1), &memory), None);
        assert_eq!(memory_table(&memory).rows[1], ["shim", "3.00 MiB", "3.00 MiB"]);
    }
}
