//! Soak: many lives of pods in a row. No resource of the node may grow with the number of lives.

pub mod sample;
pub mod trend;

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cri::{Pods, call, restart};
use crate::node;
use sample::Sample;

/// containerd is restarted after this many lives.
const RESTART: u32 = 50;
/// Caches are dropped after this many lives. Without caches, the next life takes longer.
const RECLAIM: u32 = 10;
/// Number of first lives that are not judged, because caches are filled, and the kernel creates threads.
const WARM_UP: usize = 10;
/// Minimum number of lives for a judgement.
const LEAST: usize = 40;
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
            })
        };
        let resources: Vec<Value> = self.resources.iter().map(resource).collect();
        json!({ "lives": self.lives, "seconds": self.seconds, "resources": resources })
    }
}

/// Creates and removes pods, one after the other. `first` is the number of the first life.
#[track_caller]
pub fn soak(pods: &Pods, first: u32, lives: u32) -> Outcome {
    let begin = Instant::now();
    let (mut samples, mut dying) = (Vec::new(), 0);
    for life in first..first + lives {
        let since = Instant::now();
        live(pods);
        if (life + 1).is_multiple_of(RESTART) {
            restart::restart_containerd();
        }
        if life % RECLAIM == 0 {
            dying = sample::after_reclaim();
        }
        samples.push(Sample::take(dying));
        println!("life {life}: {:.1} s", since.elapsed().as_secs_f64());
    }
    Outcome { lives: samples.len(), resources: judge(&samples), seconds: begin.elapsed().as_secs_f64() }
}

/// One life: a pod with a container, an exec, statistics, stop and removal.
#[track_caller]
fn live(pods: &Pods) {
    let pod = pods.pod();
    let container = pod.start(&pod.sh("trap 'exit 0' TERM; echo up; sleep 100000 & wait"));
    assert_eq!(container.sh("echo here"), "here", "{}", node::log_tail(20));
    call("ContainerStats", &json!({ "container_id": container.id }));
    container.stop(10);
    pod.stop();
    pod.remove();
    let name = pod.config["metadata"]["name"].as_str().unwrap_or_default();
    let _ = fs::remove_dir_all(pods.dir().join(format!("{name}.logs")));
}

/// Fits the slopes of all resources.
fn judge(samples: &[Sample]) -> Vec<Resource> {
    let judged = samples.get(WARM_UP..).unwrap_or_default();
    let enough = samples.len() >= LEAST;
    let series = |of: fn(&Sample) -> &BTreeMap<String, u64>| {
        let mut series: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (name, value) in judged.iter().flat_map(of) {
            series.entry(name).or_default().push(*value as f64);
        }
        series
    };
    let resource = |name: &str, values: &[f64], slope: trend::Slope, most: f64| Resource {
        name: name.to_owned(),
        first: values.first().copied().unwrap_or_default(),
        last: values.last().copied().unwrap_or_default(),
        slope: slope.slope,
        grows: enough && slope.slope > most && slope.least > if most < MEMORY { 0.0 } else { most },
    };
    let numbers = series(|sample| &sample.numbers);
    let memory = series(|sample| &sample.memory);
    let numbers = numbers.iter().map(|(name, values)| resource(name, values, trend::least_squares(values), NUMBER));
    let memory = memory.iter().map(|(name, values)| resource(name, values, trend::theil_sen(values), MEMORY));
    numbers.chain(memory).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_resources_are_named() {
        let sample = |life: u64| Sample {
            numbers: BTreeMap::from([("steady".to_owned(), 5), ("leaking".to_owned(), 5 + life / 10)]),
            memory: BTreeMap::from([("little".to_owned(), 1000 + life / 2), ("much".to_owned(), 1000 + 3 * life)]),
        };
        let samples: Vec<Sample> = (0..100).map(sample).collect();
        let resources = judge(&samples);
        let growing: Vec<_> = resources.iter().filter(|one| one.grows).map(|one| one.name.as_str()).collect();
        assert_eq!(growing, ["leaking", "much"]);
        assert!(judge(&samples[..LEAST - 1]).iter().all(|resource| !resource.grows));
    }
}
