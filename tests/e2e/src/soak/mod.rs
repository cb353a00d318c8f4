//! Soak: many lives of pods, a few at the same time. No resource of the node may grow with the number of lives.

pub mod sample;
pub mod trend;

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cri::{Pods, restart, try_call};
use crate::{grpc, node, vm};
use sample::Sample;
use trend::Point;

/// containerd is restarted after this many lives.
const RESTART: u32 = 50;
/// Caches are dropped after this many lives. Without caches, the next life takes longer.
const RECLAIM: u32 = 10;
/// Number of first lives that are not judged, because the kernel creates threads and fills caches. Some slab caches of
/// the node's kernel reach their size only after about a hundred lives, also with runc.
const WARM_UP: u32 = 100;
/// Minimum number of samples for a judgement.
const LEAST: usize = 30;
/// Timeout for the processes of a batch to end.
const END_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the statistics of a container.
const STATS_TIMEOUT: Duration = Duration::from_secs(60);
/// Number of slab caches that are printed.
const SLABS: usize = 12;
/// Maximum growth of memory per life, in KiB.
const MEMORY: f64 = 1.0;
/// Maximum growth of an integer resource per life. The maximum is not zero, because a resource that has grown once, by
/// one, has a slope, too.
const NUMBER: f64 = 0.002;

/// The result of a soak.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Number of lives.
    pub lives: usize,
    /// Each resource: its first and last value, its slope, and whether it grows.
    pub resources: Vec<Resource>,
    /// The slab caches that have grown the most. They are not judged.
    pub slabs: Vec<Resource>,
    /// Duration in seconds.
    pub seconds: f64,
}

/// A resource during a soak.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// The resource's name.
    pub name: String,
    /// The value after the warm-up.
    pub first: f64,
    /// The last value.
    pub last: f64,
    /// Growth for each life.
    pub slope: f64,
    /// Whether the resource grows beyond noise.
    pub grows: bool,
    /// The values after the warm-up, each with the number of lives before it. Only for memory.
    pub values: Vec<Point>,
}

impl Outcome {
    /// Returns the resources that grow.
    pub fn growing(&self) -> impl Iterator<Item = &Resource> {
        self.resources.iter().filter(|resource| resource.grows)
    }

    /// Returns the outcome as JSON.
    pub fn to_json(&self) -> Value {
        let resource = |resource: &Resource| {
            json!({
                "name": resource.name,
                "first": resource.first,
                "last": resource.last,
                "slope": resource.slope,
                "grows": resource.grows,
                "values": resource.values,
            })
        };
        let all = |resources: &[Resource]| resources.iter().map(resource).collect::<Vec<Value>>();
        let (resources, slabs) = (all(&self.resources), all(&self.slabs));
        json!({ "lives": self.lives, "seconds": self.seconds, "resources": resources, "slabs": slabs })
    }
}

/// Returns the minimum number of lives for a judgement (`xtask/src/chaos/mod.rs` has the same rule).
pub fn least_lives(at_once: u32) -> u32 {
    // The samples of whole batches after the warm-up, and one batch that the warm-up has begun.
    WARM_UP + (LEAST as u32 + 1) * at_once
}

/// Creates and removes pods in batches of `at_once`, and measures between the batches. `first` is the number of the
/// first life.
#[track_caller]
pub fn soak(pods: &Pods, first: u32, lives: u32, at_once: u32) -> Outcome {
    let begin = Instant::now();
    let (mut samples, mut dying) = (Vec::new(), 0);
    let mut ended = 0;
    while ended < lives {
        let since = Instant::now();
        let count = at_once.clamp(1, lives - ended);
        batch(pods, count);
        let before = first + ended;
        ended += count;
        let passes = |step: u32| (before + count) / step > before / step;
        if passes(RESTART) {
            restart::restart_containerd();
        }
        if ended == count || passes(RECLAIM) {
            dying = sample::after_reclaim();
        }
        samples.push((ended, Sample::take(dying)));
        println!("lives up to {}: {:.1} s", before + count, since.elapsed().as_secs_f64());
    }
    let seconds = begin.elapsed().as_secs_f64();
    Outcome { lives: ended as usize, resources: judge(&samples), slabs: growing_slabs(&samples), seconds }
}

/// Runs lives at the same time, and waits until all their processes have ended.
#[track_caller]
fn batch(pods: &Pods, count: u32) {
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                live(pods);
                // The scope does not wait for the destructors of the thread's variables.
                grpc::disconnect();
            });
        }
    });
    // A process that stays is not reported here, but counted in all further samples.
    node::eventually(END_TIMEOUT, || (!vm::husk_runs()).then_some(()));
}

/// One life: a pod with a container, an exec, statistics, stop and removal.
#[track_caller]
fn live(pods: &Pods) {
    let pod = pods.pod();
    let container = pod.start(&pod.sh("trap 'exit 0' TERM; echo up; sleep 100000 & wait"));
    assert_eq!(container.sh("echo here"), "here", "{}", node::log_tail(20));
    // On a busy node, statistics can fail at their limit of a second.
    let request = json!({ "container_id": container.id });
    let stats = node::eventually(STATS_TIMEOUT, || try_call("ContainerStats", &request).ok());
    assert!(stats.is_some(), "no statistics within {} s\n{}", STATS_TIMEOUT.as_secs(), node::log_tail(40));
    // A SIGTERM before the script has set its trap would be lost.
    container.wait_for("up");
    container.stop(10);
    pod.stop();
    pod.remove();
    let name = pod.config["metadata"]["name"].as_str().unwrap_or_default();
    let _ = fs::remove_dir_all(pods.dir().join(format!("{name}.logs")));
}

/// Returns the values of resources after the warm-up. A sample has the number of lives before it.
fn series(samples: &[(u32, Sample)], of: fn(&Sample) -> &BTreeMap<String, u64>) -> BTreeMap<&str, Vec<Point>> {
    let mut series: BTreeMap<&str, Vec<Point>> = BTreeMap::new();
    for (lives, sample) in samples.iter().filter(|(lives, _)| *lives > WARM_UP) {
        for (name, value) in of(sample) {
            series.entry(name).or_default().push((f64::from(*lives), *value as f64));
        }
    }
    series
}

/// Fits the slopes of all resources.
fn judge(samples: &[(u32, Sample)]) -> Vec<Resource> {
    let enough = samples.iter().filter(|(lives, _)| *lives > WARM_UP).count() >= LEAST;
    let resource = |name: &str, values: &[Point], slope: trend::Slope, most: f64| Resource {
        name: name.to_owned(),
        first: values.first().map(|point| point.1).unwrap_or_default(),
        last: values.last().map(|point| point.1).unwrap_or_default(),
        slope: slope.slope,
        grows: enough && slope.slope > most && slope.least > if most < MEMORY { 0.0 } else { most },
        values: if most < MEMORY { Vec::new() } else { values.to_vec() },
    };
    let numbers = series(samples, |sample| &sample.numbers);
    let memory = series(samples, |sample| &sample.memory);
    let numbers = numbers.iter().map(|(name, values)| resource(name, values, trend::least_squares(values), NUMBER));
    let memory = memory.iter().map(|(name, values)| resource(name, values, trend::theil_sen(values), MEMORY));
    numbers.chain(memory).collect()
}

/// Returns the slab caches that have grown the most.
fn growing_slabs(samples: &[(u32, Sample)]) -> Vec<Resource> {
    let ends = |name: &str, values: Vec<Point>| {
        let (first, last) = (values.first()?.1, values.last()?.1);
        let slope = trend::theil_sen(&values).slope;
        (last > first).then(|| Resource { name: format!("slab {name}"), first, last, slope, grows: false, values })
    };
    let all = series(samples, |sample| &sample.slabs);
    let mut growing: Vec<Resource> = all.into_iter().filter_map(|(name, values)| ends(name, values)).collect();
    growing.sort_by(|one, other| (other.last - other.first).total_cmp(&(one.last - one.first)));
    growing.truncate(SLABS);
    growing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_resources_are_named() {
        let sample = |life: u64| Sample {
            numbers: BTreeMap::from([("steady".to_owned(), 5), ("leaking".to_owned(), 5 + life / 10)]),
            memory: BTreeMap::from([("little".to_owned(), 1000 + life / 2), ("much".to_owned(), 1000 + 3 * life)]),
            slabs: BTreeMap::from([("steady".to_owned(), 5), ("growing".to_owned(), 5 + life)]),
        };
        // A batch has four lives.
        let samples: Vec<(u32, Sample)> = (1..=75).map(|batch| (4 * batch, sample(4 * u64::from(batch)))).collect();
        let resources = judge(&samples);
        let growing: Vec<_> = resources.iter().filter(|one| one.grows).map(|one| one.name.as_str()).collect();
        assert_eq!(growing, ["leaking", "much"]);
        let slope = |name: &str| resources.iter().find(|one| one.name == name).unwrap().slope;
        assert!((slope("leaking") - 0.1).abs() < 0.01 && (slope("much") - 3.0).abs() < 0.01, "{resources:?}");
        let slabs: Vec<_> = growing_slabs(&samples).into_iter().map(|one| (one.name, one.slope)).collect();
        assert_eq!(slabs, [("slab growing".to_owned(), 1.0)]);
        assert!(judge(&samples[..WARM_UP as usize / 4 + LEAST - 1]).iter().all(|resource| !resource.grows));
    }

    #[test]
    fn least_number_of_lives_has_enough_samples() {
        for at_once in [1, 3, 4, 7, 16] {
            let lives = least_lives(at_once);
            let judged = (1..=lives / at_once).map(|batch| batch * at_once).filter(|lives| *lives > WARM_UP);
            assert!(judged.count() >= LEAST, "{at_once} at once");
        }
    }
}
