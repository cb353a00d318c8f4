//! Timelines of the starts that a benchmark measures.

use std::fs;
use std::time::Duration;

use husk_benchmarks::{Table, median};
use husk_config::timeline::Timeline;
use nix::time::{ClockId, clock_gettime};

use crate::node;

/// File to which Husk's shims append timelines during a benchmark.
pub const PATH: &str = "/run/husk-bench-timelines";

/// Returns the timeline of a sandbox. Waits for the timeline, because the shim may write it after `ctr` has exited.
pub fn timeline(sandbox: &str) -> Timeline {
    let find = || {
        let text = fs::read_to_string(PATH).ok()?;
        Timeline::from_lines(&text).ok()?.into_iter().rev().find(|timeline| timeline.sandbox == sandbox)
    };
    node::eventually(Duration::from_secs(10), find).unwrap_or_else(|| panic!("no timeline of {sandbox} in {PATH}"))
}

/// Returns the time of a step in ms.
pub fn at(timeline: &Timeline, name: &str) -> f64 {
    let step = timeline.steps.iter().find(|step| step.name == name);
    step.unwrap_or_else(|| panic!("no step {name:?} in {timeline:?}")).at_ns as f64 / 1e6
}

/// Returns the current time of CLOCK_MONOTONIC, the clock of the timelines, in ns.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    time.tv_sec().cast_unsigned() * 1_000_000_000 + time.tv_nsec().cast_unsigned()
}

/// Median time of a timeline step over several starts.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTime {
    name: String,
    /// Median time since the start of `ctr`, in ms.
    at: f64,
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

/// Returns a table of the steps of a variant's start.
pub fn table(variant: &str, steps: &[StepTime]) -> Table {
    let mut before = 0.0;
    let rows = steps.iter().map(|StepTime { name, at }| {
        let since = at - std::mem::replace(&mut before, *at);
        vec![name.clone(), format!("{at:.0} ms"), format!("{since:.0} ms")]
    });
    let rows = rows.collect();
    let columns = [&format!("start of {variant}"), "since `ctr` began", "since the previous step"];
    Table { columns: columns.map(str::to_owned).to_vec(), rows }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let times = step_times(&starts);
        assert_eq!(times, expected.map(|(name, at)| StepTime { name: name.to_owned(), at }));
        assert_eq!(table("husk boot", &times).rows[1], ["agent ready", "50 ms", "30 ms"]);
    }
}
