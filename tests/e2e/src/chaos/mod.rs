//! Chaos: faults in all phases of a pod's life, which a seed determines. `docs/reliability.md` lists the checks.
//!
//! The engine runs the life of a victim ([`life`]) while a witness counts ([`witness`]). In one phase of this life, it
//! injects a fault ([`faults`]). A fault may end the victim, or fail a request. It must not leave anything on the node
//! ([`census`]), disturb the order of events ([`grammar`]), or reach the witness.

pub mod census;
pub mod failpoints;
pub mod faults;
pub mod grammar;
mod judge;
mod life;
pub mod plan;
mod targets;
mod victim;
mod witness;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cri::Pods;
use crate::events::Events;
use crate::figures::print_line;
use crate::node;
use census::Census;
use faults::file_systems::FileSystems;
use plan::Step;
use witness::Witness;

/// Result of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The step.
    pub step: Step,
    /// The line that was printed before the step.
    pub name: String,
    /// Duration in seconds.
    pub seconds: f64,
    /// Why the fault could not be injected.
    pub missed: Option<String>,
    /// What is wrong. Empty if the step has passed.
    pub findings: Vec<String>,
}

impl Report {
    /// Returns the report as JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "step": self.step.id.to_string(),
            "name": self.name,
            "phase": format!("{:?}", self.step.phase),
            "class": format!("{:?}", self.step.fault.class()),
            "fault": format!("{:?}", self.step.fault),
            "seconds": self.seconds,
            "missed": self.missed,
            "findings": self.findings,
        })
    }
}

/// What the steps of one boot share.
pub struct Shard<'a> {
    pods: &'a Pods,
    witness: Witness,
    files: FileSystems,
    /// What the node holds between two lives.
    base: Census,
    events: Events,
    /// Network namespaces that exist between two lives.
    namespaces: Vec<PathBuf>,
}

impl<'a> Shard<'a> {
    /// Starts the witness, and takes the first census.
    #[track_caller]
    pub fn new(pods: &'a Pods) -> Self {
        let files = FileSystems::mount();
        let witness = Witness::start(pods);
        let events = Events::watch();
        Self { pods, witness, files, base: Census::take(), events, namespaces: targets::network_namespaces() }
    }

    /// Runs one step. Prints the step before it begins, and its result.
    pub fn run(&mut self, step: Step) -> Report {
        self.run_named(step, &step.to_string())
    }

    fn run_named(&mut self, step: Step, name: &str) -> Report {
        print_line(name);
        let begin = Instant::now();
        let (missed, findings) = life::run(self, step, judge::judge);
        if !findings.is_empty() {
            print_line(format_args!("--- last 40 lines of containerd's log\n{}\n---", node::log_tail(40)));
            // The next steps must not report what this step has left.
            self.rebase();
        }
        let report = Report { step, name: name.to_owned(), seconds: begin.elapsed().as_secs_f64(), missed, findings };
        let missed = report.missed.as_ref().map(|why| format!(", no fault: {why}")).unwrap_or_default();
        print_line(format_args!("    {:.1} s{missed}", report.seconds));
        for finding in &report.findings {
            print_line(format_args!("    FOUND {finding}"));
        }
        report
    }

    /// Takes a new base.
    fn rebase(&mut self) {
        self.base = Census::take();
        self.namespaces = targets::network_namespaces();
    }
}
