//! Timeline of a pod's start. The shim writes the timeline. `husk trace` and the benchmark read it.
//!
//! `/run/husk/<namespace>/<sandbox>/timeline.json` holds one [`Timeline`]. The file that `timeline_log` names in the
//! configuration holds one timeline per line.

use serde::{Deserialize, Serialize};

/// The steps of one pod's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Sandbox id.
    pub sandbox: String,
    /// containerd namespace.
    pub namespace: String,
    /// The steps, in chronological order.
    pub steps: Vec<Step>,
}

/// A step of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Name of the step, such as `agent ready`.
    pub name: String,
    /// Time at which the step was reached, in nanoseconds of the host's CLOCK_MONOTONIC. The host's processes share
    /// this clock. Therefore the times of several processes are comparable.
    pub at_ns: u64,
}

impl Timeline {
    /// Records that the step `name` was reached at `at_ns`. Steps may be recorded out of order.
    pub fn push(&mut self, name: impl Into<String>, at_ns: u64) {
        let at = self.steps.partition_point(|step| step.at_ns <= at_ns);
        self.steps.insert(at, Step { name: name.into(), at_ns });
    }

    /// Encodes the timeline as one line of JSON, newline included.
    ///
    /// # Errors
    /// Never fails for these types. The return type is that of `serde_json`.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self).map(|mut line| {
            line.push('\n');
            line
        })
    }

    /// Parses timelines, one per line. Skips empty lines. Fails at the first line that is not a timeline.
    pub fn from_lines(text: &str) -> Result<Vec<Self>, serde_json::Error> {
        text.lines().filter(|line| !line.trim().is_empty()).map(serde_json::from_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn push_keeps_steps_sorted_and_lines_round_trip() {
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
