//! When the steps of a pod's start happened: written by the shim, read by `husk trace` and the benchmark.
//!
//! `/run/husk/<namespace>/<sandbox>/timeline.json` holds one [`Timeline`]; the file `timeline_log` of the configuration
//! holds one per line.

use serde::{Deserialize, Serialize};

/// The steps of one pod's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Sandbox id.
    pub sandbox: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The steps, in the order they happened.
    pub steps: Vec<Step>,
}

/// One moment of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was reached, such as `agent ready`.
    pub name: String,
    /// Nanoseconds of the host's monotonic clock (CLOCK_MONOTONIC), so that steps of several processes compare.
    pub at_ns: u64,
}

impl Timeline {
    /// Notes that `name` was reached at `at_ns`; steps noted out of order are put in order.
    pub fn push(&mut self, name: impl Into<String>, at_ns: u64) {
        let at = self.steps.partition_point(|step| step.at_ns <= at_ns);
        self.steps.insert(at, Step { name: name.into(), at_ns });
    }

    /// The timeline as one line of JSON, newline included.
    ///
    /// # Errors
    /// None that these types can produce; `serde_json` has the signature.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self).map(|mut line| {
            line.push('\n');
            line
        })
    }

    /// Reads a file of timelines, one per line; empty lines are skipped.
    ///
    /// # Errors
    /// The first line that is no timeline.
    pub fn from_lines(text: &str) -> Result<Vec<Self>, serde_json::Error> {
        text.lines().filter(|line| !line.trim().is_empty()).map(serde_json::from_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_kept_in_order_of_time_and_lines_round_trip() {
        let mut timeline = Timeline { sandbox: "a".into(), namespace: "default".into(), steps: vec![] };
        for (name, at) in [("two", 20), ("three", 30), ("one", 10), ("two again", 20)] {
            timeline.push(name, at);
        }
        let names: Vec<_> = timeline.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, ["one", "two", "two again", "three"]);
        let text = timeline.to_line().unwrap().repeat(2) + "\n";
        assert_eq!(Timeline::from_lines(&text).unwrap(), [timeline.clone(), timeline]);
        assert!(Timeline::from_lines("{}").is_err());
    }
}
