//! Statistics and report of the benchmark.

pub mod limits;
pub mod network;

use std::fmt::Write as _;

use husk_config::timeline::Timeline;

/// Returns the median, or 0 if there are no values. For an even number of values, the median is the mean of the two
/// middle values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Median time of a timeline step over several starts.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTime {
    /// Name of the step.
    pub name: String,
    /// Median time since the start of `ctr`, in ms.
    pub at: f64,
}

/// Computes the median time of each step over several starts. `starts` has a pair for each start: the time at which
/// `ctr` was started (CLOCK_MONOTONIC, in ns), and the timeline. Omits steps that do not occur in all starts.
pub fn step_times(starts: &[(u64, Timeline)]) -> Vec<StepTime> {
    let Some((_, first)) = starts.first() else { return Vec::new() };
    let mut times: Vec<StepTime> = Vec::new();
    for step in &first.steps {
        let found: Vec<f64> = starts
            .iter()
            .filter_map(|(began, timeline)| {
                let same = timeline.steps.iter().find(|other| other.name == step.name)?;
                Some((same.at_ns.saturating_sub(*began)) as f64 / 1e6)
            })
            .collect();
        if found.len() == starts.len() && !times.iter().any(|time| time.name == step.name) {
            times.push(StepTime { name: step.name.clone(), at: median(&found) });
        }
    }
    times.sort_by(|one, other| one.at.total_cmp(&other.at));
    times
}

/// Measurements of one runtime.
#[derive(Debug, Clone)]
pub struct Series {
    /// The runtime's short name.
    pub name: &'static str,
    /// Duration of each run, in seconds.
    pub seconds: Vec<f64>,
}

/// Memory use of an idle container, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryUse {
    /// PSS of the VMM, without guest memory.
    pub vmm: u64,
    /// PSS of guest memory.
    pub guest: u64,
    /// PSS of the shim.
    pub shim: u64,
    /// PSS of the shim's launcher.
    pub launcher: u64,
}

/// Formats the report as Markdown, for `docs/performance.md`.
///
/// `weights` has a pair for each measured runtime: its name and its memory use.
pub fn report(series: &[Series], steps: &[StepTime], weights: &[(&str, MemoryUse)]) -> String {
    let mut text = String::new();
    let base = series.iter().find(|one| one.name == "runc").map_or(0.0, |one| median(&one.seconds));
    let _ = writeln!(text, "| `ctr run --rm … true` | median | fastest | slowest | runs | × runc |");
    let _ = writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: |");
    for Series { name, seconds } in series {
        let middle = median(seconds);
        let fastest = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let slowest = seconds.iter().copied().fold(0.0, f64::max);
        let ratio = if base > 0.0 { format!("{:.2}", middle / base) } else { "–".to_owned() };
        let runs = seconds.len();
        let _ = writeln!(text, "| {name} | {middle:.2} s | {fastest:.2} s | {slowest:.2} s | {runs} | {ratio} |");
    }
    if let Some(cost) = jail_cost(series, weights) {
        let _ = writeln!(text, "\n{cost}");
    }
    if !steps.is_empty() {
        let _ = writeln!(text, "\n| Husk's start | since `ctr` began | since the previous step |");
        let _ = writeln!(text, "| --- | ---: | ---: |");
        let mut before = 0.0;
        for StepTime { name, at } in steps {
            let _ = writeln!(text, "| {name} | {at:.0} ms | {:.0} ms |", at - before);
            before = *at;
        }
    }
    for (name, MemoryUse { vmm, guest, shim, launcher }) in weights {
        let mib = |kib: &u64| *kib as f64 / 1024.0;
        let _ = writeln!(text, "\n| PSS of an idle container of {name} | MiB |\n| --- | ---: |");
        let _ = writeln!(text, "| VMM process, without guest memory | {:.2} |", mib(vmm));
        let _ = writeln!(text, "| shim | {:.2} |", mib(shim));
        let _ = writeln!(text, "| launcher | {:.2} |", mib(launcher));
        let _ = writeln!(text, "| guest memory touched | {:.1} |", mib(guest));
    }
    text
}

/// Describes the cost of the jail: what Husk with the jail needs in addition to a build without the jail. Returns
/// `None` if one of the two was not measured.
///
/// The difference in time is the median over the rounds, because the two starts of a round run one after the other.
fn jail_cost(series: &[Series], weights: &[(&str, MemoryUse)]) -> Option<String> {
    let seconds = |name: &str| series.iter().find(|one| one.name == name).map(|one| &one.seconds);
    let memory = |name: &str| weights.iter().find(|(one, _)| *one == name).map(|(_, memory)| memory);
    let (with, without) = (seconds("husk")?, seconds("unjailed")?);
    let differences: Vec<f64> = with.iter().zip(without).map(|(with, without)| with - without).collect();
    let mut text =
        format!("The jail adds {:+.1} % to the median start", 100.0 * median(&differences) / median(without));
    if let (Some(with), Some(without)) = (memory("husk"), memory("unjailed")) {
        let kib = |memory: &MemoryUse| (memory.vmm + memory.shim + memory.launcher) as f64;
        let _ = write!(text, ", and {:+.2} MiB to the memory of a pod", (kib(with) - kib(without)) / 1024.0);
    }
    Some(text + ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jail_cost_compares_the_runs_of_each_round() {
        let series = [
            Series { name: "husk", seconds: vec![1.02, 2.02, 9.0] },
            Series { name: "unjailed", seconds: vec![1.0, 2.0, 3.0] },
        ];
        let memory = |vmm| MemoryUse { vmm, shim: 3072, launcher: 512, guest: 80_000 };
        let weights = [("husk", memory(2048)), ("unjailed", memory(1536))];
        let text = jail_cost(&series, &weights).unwrap();
        assert_eq!(text, "The jail adds +1.0 % to the median start, and +0.50 MiB to the memory of a pod.");
        assert_eq!(jail_cost(&series[..1], &weights), None);
    }

    #[test]
    fn median_handles_odd_and_even_counts() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn step_times_omits_steps_missing_in_a_start() {
        let start = |offset: u64, steps: &[(&str, u64)]| {
            let mut timeline = Timeline::default();
            steps.iter().for_each(|(name, at)| timeline.push(*name, offset + at * 1_000_000));
            (offset, timeline)
        };
        let starts = [
            start(5, &[("shim up", 10), ("agent ready", 50)]),
            start(9, &[("shim up", 20), ("agent ready", 40)]),
            start(7, &[("shim up", 30), ("agent ready", 60), ("odd", 70)]),
        ];
        let expected = [("shim up", 20.0), ("agent ready", 50.0)];
        assert_eq!(step_times(&starts), expected.map(|(name, at)| StepTime { name: name.to_owned(), at }));
    }

    #[test]
    fn report_shows_ratio_to_runc() {
        let series =
            [Series { name: "runc", seconds: vec![2.0] }, Series { name: "husk", seconds: vec![3.0, 3.0, 9.0] }];
        let text = report(&series, &[StepTime { name: "shim up".into(), at: 12.0 }], &[("husk", MemoryUse::default())]);
        assert!(text.contains("| husk | 3.00 s | 3.00 s | 9.00 s | 3 | 1.50 |"), "{text}");
        assert!(text.contains("| shim up | 12 ms | 12 ms |"), "{text}");
    }
}
