//! Scale: many pods at once on one node. What they take from the node has to grow linearly, and no limit of the node
//! may be reached below [`TARGET`] pods because of Husk.

pub mod limits;
pub mod line;
pub mod pods;
pub mod sample;

use serde_json::{Value, json};

use limits::{Limit, Reached, User};
use line::Line;
use sample::Values;

/// Number of pods below which no limit may be reached.
pub const TARGET: f64 = 1000.0;
/// Factor by which the starts of the last quarter of the pods may take longer than those of the first quarter.
const SLOWER: f64 = 2.0;
/// Difference between the two that counts as noise, in seconds.
const SLOWER_NOISE: f64 = 1.0;

/// A quantity that is fitted to a line.
#[derive(Debug)]
pub struct Quantity {
    /// The quantity's name in [`Values`].
    pub name: &'static str,
    /// Difference of the slopes that counts as noise. `None` if the quantity does not depend on Husk alone, and is not
    /// judged.
    pub noise: Option<f64>,
}

const fn judged(name: &'static str, noise: f64) -> Quantity {
    Quantity { name, noise: Some(noise) }
}

const fn shown(name: &'static str) -> Quantity {
    Quantity { name, noise: None }
}

/// Noise of a quantity that has a fixed value for each pod.
const EXACT: f64 = 0.2;
/// Noise of the number of threads. Runtimes start threads on demand, and these threads end after some idle time.
const THREADS: f64 = 1.0;
/// Noise of memory, in KiB.
const MEMORY: f64 = 128.0;

/// All quantities, in the order of the report. Memory is in KiB.
pub const QUANTITIES: [Quantity; 44] = [
    judged("mounts of the node", EXACT),
    judged("most mounts of a shim", EXACT),
    judged("most mounts of a VMM", EXACT),
    judged("inotify instances", EXACT),
    judged("inotify watches", EXACT),
    judged("epoll watches", 2.0),
    judged("fds of the shims", 2.0),
    judged("most fds of a shim", EXACT),
    judged("fds of the launchers", EXACT),
    judged("fds of the VMMs", EXACT),
    shown("fds of containerd"),
    judged("open files of the node", 8.0),
    judged("threads of the shims", THREADS),
    judged("threads of the launchers", EXACT),
    judged("threads of the VMMs", EXACT),
    shown("threads of containerd"),
    judged("threads of the node", THREADS),
    judged("tasks of kubepods", THREADS),
    judged("PSS of the shims", MEMORY),
    judged("PSS of the launchers", MEMORY),
    judged("PSS of the VMMs", MEMORY),
    shown("PSS of containerd"),
    judged("kernel memory", 2.0 * MEMORY),
    shown("memory in use"),
    judged("cgroups", EXACT),
    judged("memory cgroups", EXACT),
    judged("Unix sockets", 1.0),
    judged("mount namespaces", EXACT),
    judged("PID namespaces", EXACT),
    judged("network namespaces", EXACT),
    judged("IPC namespaces", EXACT),
    judged("UTS namespaces", EXACT),
    judged("cgroup namespaces", EXACT),
    judged("user namespaces", EXACT),
    judged("interfaces of the node", EXACT),
    judged("taps", EXACT),
    judged("BPF programs", EXACT),
    judged("BPF maps", EXACT),
    judged("BPF links", EXACT),
    judged("asynchronous I/O requests", EXACT),
    shown("ports of CNI's bridge"),
    shown("IPv4 neighbours"),
    shown("IPv6 neighbours"),
    shown("keys of root"),
];

/// Samples with growing numbers of pods.
#[derive(Debug, Default)]
pub struct Series {
    samples: Vec<(u32, Values)>,
    /// The number of pods after each batch, and the median time of a start in this batch, in seconds.
    starts: Vec<(f64, f64)>,
}

impl Series {
    /// Adds the sample after a batch. `start` is the median time of a start, in seconds.
    pub fn add(&mut self, pods: u32, values: Values, start: f64) {
        self.samples.push((pods, values));
        self.starts.push((f64::from(pods), start));
    }

    /// Returns the values of a quantity that was measured in all samples.
    fn points(&self, name: &str) -> Vec<(f64, f64)> {
        let value = |(pods, values): &(u32, Values)| Some((f64::from(*pods), *values.get(name)?));
        self.samples.iter().filter_map(value).collect()
    }

    /// Fits the lines, and extends them to the limits.
    pub fn judge(self, limits: Vec<Limit>) -> Outcome {
        let mut findings = Vec::new();
        let mut growths = Vec::new();
        let count = self.samples.last().map_or(0, |sample| sample.0);
        for Quantity { name, noise } in &QUANTITIES {
            let points = self.points(name);
            let Some((_, last)) = points.last() else { continue };
            let accelerates = noise.is_some_and(|noise| line::accelerates(&points, noise));
            if accelerates {
                let (first, last) = line::ends(&points).unwrap_or_default();
                findings.push(format!("{name}: {first:.2} for each of the first pods, {last:.2} for each of the last"));
            }
            growths.push(Growth {
                name,
                last: *last,
                line: line::fit(&points),
                ends: line::ends(&points),
                accelerates,
            });
        }
        // The last pods tell how the quantity goes on to grow. Some quantities stop growing.
        let rest = |growth: &Growth| {
            let slope = growth.ends.map_or(growth.line.slope, |ends| ends.1);
            Line { start: growth.last - slope * f64::from(count), slope }
        };
        let lines = growths.iter().map(|growth| (growth.name, rest(growth))).collect();
        let reached = limits::extend(limits, &lines);
        for Reached { limit, pods } in &reached {
            if let Some(pods) = pods.filter(|pods| *pods < TARGET && limit.user == User::Husk) {
                findings.push(format!("{} ({}) is reached with {pods:.0} pods", limit.name, limit.value));
            }
        }
        let mut starts: Vec<f64> = self.starts.iter().map(|start| start.1).collect();
        let quarter = (starts.len() / 4).max(1);
        let early = husk_benchmarks::median(starts.get(..quarter).unwrap_or_default());
        let late = husk_benchmarks::median(&starts.split_off(starts.len().saturating_sub(quarter)));
        if late > early * SLOWER + SLOWER_NOISE {
            findings.push(format!("a start takes {late:.1} s at the end, and {early:.1} s at the beginning"));
        }
        Outcome { pods: count, growths, reached, starts: self.starts, findings }
    }
}

/// How a quantity grows.
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    /// The quantity.
    pub name: &'static str,
    /// The last value.
    pub last: f64,
    /// The line that fits best.
    pub line: Line,
    /// The slopes of the first and the last quarter of the samples.
    pub ends: Option<(f64, f64)>,
    /// Whether the last pods take more than the first pods.
    pub accelerates: bool,
}

/// The result of a run.
#[derive(Debug)]
pub struct Outcome {
    /// Number of pods.
    pub pods: u32,
    /// The quantities.
    pub growths: Vec<Growth>,
    /// The limits, in the order in which they are reached.
    pub reached: Vec<Reached>,
    /// The number of pods after each batch, and the median time of a start in this batch, in seconds.
    pub starts: Vec<(f64, f64)>,
    /// What must not be so.
    pub findings: Vec<String>,
}

impl Outcome {
    /// Returns the outcome as JSON.
    pub fn to_json(&self) -> Value {
        let growth = |growth: &Growth| {
            json!({ "name": growth.name, "last": growth.last, "start": growth.line.start, "slope": growth.line.slope,
                    "first_and_last_slope": growth.ends, "accelerates": growth.accelerates })
        };
        json!({
            "pods": self.pods,
            "quantities": self.growths.iter().map(growth).collect::<Vec<Value>>(),
            "limits": self.reached.iter().map(Reached::to_json).collect::<Vec<Value>>(),
            "starts": self.starts,
            "findings": self.findings,
        })
    }

    /// Returns the report: a table of the quantities, and a table of the limits.
    pub fn report(&self) -> String {
        let mut lines = vec![
            format!("with {} pods | value | for each pod | first quarter | last quarter |", self.pods),
            "--- | --: | --: | --: | --: |".to_owned(),
        ];
        for Growth { name, last, line, ends, accelerates } in &self.growths {
            let (first, end) = ends.unwrap_or((f64::NAN, f64::NAN));
            let mark = if *accelerates { " NOT LINEAR" } else { "" };
            lines.push(format!("{name} | {last:.0} | {:.2} | {first:.2} | {end:.2}{mark} |", line.slope));
        }
        lines.push("limit | value | quantity | reached with |".to_owned());
        lines.push("--- | --: | --- | --: |".to_owned());
        for Reached { limit, pods } in &self.reached {
            let pods = pods.map_or_else(|| "never".to_owned(), |pods| format!("{pods:.0} pods"));
            lines.push(format!("{} | {:.0} | {} | {pods} |", limit.name, limit.value, limit.quantity));
        }
        for (pods, seconds) in &self.starts {
            lines.push(format!("start of a pod in the batch up to {pods:.0} pods: {seconds:.2} s (median)"));
        }
        let first = |user| self.reached.iter().find(|one| one.limit.user == user && one.pods.is_some());
        for (user, name) in [(User::Husk, "Husk"), (User::Node, "containerd, CNI or the machine")] {
            if let Some(Reached { limit, pods: Some(pods) }) = first(user) {
                lines.push(format!("first limit that {name} reaches: {}, with {pods:.0} pods", limit.name));
            }
        }
        lines.extend(self.findings.iter().map(|finding| format!("FINDING: {finding}")));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(of: impl Fn(u32) -> Values, start: impl Fn(u32) -> f64) -> Series {
        let mut series = Series::default();
        (1..=20).map(|batch| batch * 25).for_each(|pods| series.add(pods, of(pods), start(pods)));
        series
    }

    fn limit(name: &'static str, value: f64, quantity: &'static str, user: User) -> Limit {
        Limit { name, value, quantity, user }
    }

    #[test]
    fn linear_growth_below_all_limits_has_no_findings() {
        let values = |pods: u32| Values::from([("threads of the node", f64::from(100 + 14 * pods))]);
        let limits = vec![limit("kernel.pid_max", 32768.0, "threads of the node", User::Husk)];
        let outcome = series(values, |_| 2.0).judge(limits);
        assert_eq!(outcome.findings, [""; 0]);
        assert!(
            outcome.report().contains("first limit that Husk reaches: kernel.pid_max, with 2333 pods"),
            "{}",
            outcome.report()
        );
    }

    #[test]
    fn quantity_that_stops_growing_does_not_reach_its_limit() {
        let values = |pods: u32| Values::from([("inotify instances", f64::from(pods.min(32)))]);
        let instances = limit("fs.inotify.max_user_instances", 128.0, "inotify instances", User::Husk);
        let outcome = series(values, |_| 2.0).judge(vec![instances]);
        assert!(outcome.findings.is_empty() && outcome.reached[0].pods.is_none(), "{}", outcome.report());
    }

    #[test]
    fn growth_limits_and_slow_starts_are_found() {
        let values = |pods: u32| {
            let pods = f64::from(pods);
            let bridge = ("ports of CNI's bridge", 2.0 * pods);
            Values::from([("most mounts of a shim", pods * pods / 50.0), ("inotify instances", pods), bridge])
        };
        let limits = vec![
            limit("fs.inotify.max_user_instances", 128.0, "inotify instances", User::Husk),
            limit("ports of a bridge", 1023.0, "ports of CNI's bridge", User::Node),
        ];
        let findings = series(values, |pods| f64::from(pods) / 25.0).judge(limits).findings.join("\n");
        assert_eq!(findings.lines().count(), 3, "{findings}");
        for part in ["most mounts of a shim: ", "max_user_instances (128) is reached with 128 pods", "a start takes"] {
            assert!(findings.contains(part), "{findings}");
        }
    }
}
