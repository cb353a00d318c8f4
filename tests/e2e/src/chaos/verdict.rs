//! The result of a step, and the verdict about the steps of a run.

use std::fmt;

use serde_json::{Value, json};

use super::plan::Step;

/// A run fails if more than one of this many steps has not struck.
const STEPS_PER_MISS: usize = 50;

/// Result of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The step.
    pub step: Step,
    /// The line that was printed before the step.
    pub name: String,
    /// Duration in seconds.
    pub seconds: f64,
    /// Why the fault did not strike, for each attempt that failed.
    pub misses: Vec<String>,
    /// Whether the fault struck.
    pub struck: bool,
    /// What is wrong. Empty if nothing was found.
    pub findings: Vec<String>,
}

impl Report {
    /// Returns the report as JSON. `cargo xtask chaos` adds the reports up (`xtask/src/chaos/summary.rs`).
    pub fn to_json(&self) -> Value {
        json!({
            "step": self.step.id.to_string(),
            "name": self.name,
            "phase": format!("{:?}", self.step.phase),
            "class": format!("{:?}", self.step.fault.class()),
            "fault": format!("{:?}", self.step.fault),
            "seconds": self.seconds,
            "misses": self.misses,
            "struck": self.struck,
            "findings": self.findings,
        })
    }
}

/// The numbers of steps of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Faults that struck.
    pub struck: usize,
    /// Steps whose fault did not strike in any attempt.
    pub missed: usize,
    /// Steps with findings.
    pub found: usize,
}

impl Tally {
    /// Counts the steps.
    pub fn of(reports: &[Report]) -> Self {
        let count = |of: fn(&Report) -> bool| reports.iter().filter(|report| of(report)).count();
        let struck = count(|report| report.struck);
        Self { struck, missed: reports.len() - struck, found: count(|report| !report.findings.is_empty()) }
    }

    /// Returns whether the run has passed. A run without a fault that struck proves nothing.
    pub fn passes(self) -> bool {
        self.struck > 0 && self.found == 0 && self.missed <= (self.struck + self.missed) / STEPS_PER_MISS
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} faults struck, {} did not strike, {} steps with findings", self.struck, self.missed, self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::plan;

    fn tally(struck: usize, missed: usize, found: usize) -> Tally {
        Tally { struck, missed, found }
    }

    #[test]
    fn step_that_did_not_strike_is_not_counted_as_a_fault() {
        let steps = plan::shard(1, 0);
        let report = |number: usize| Report {
            step: steps[number],
            name: String::new(),
            seconds: 1.0,
            misses: vec!["no shim".to_owned(); number],
            struck: number < 4,
            findings: if number == 2 { vec!["a process is left".to_owned()] } else { Vec::new() },
        };
        let reports: Vec<Report> = (0..5).map(report).collect();
        assert_eq!(Tally::of(&reports), tally(4, 1, 1));
        assert_eq!(reports[4].to_json()["struck"], false);
    }

    #[test]
    fn run_fails_with_findings_with_many_misses_and_without_faults() {
        assert!(tally(50, 0, 0).passes() && tally(49, 1, 0).passes() && tally(490, 10, 0).passes());
        assert!(!tally(50, 0, 1).passes() && !tally(48, 2, 0).passes() && !tally(489, 11, 0).passes());
        assert!(!tally(7, 1, 0).passes(), "a short run has no room for a miss");
        assert!(!tally(0, 0, 0).passes());
    }
}
