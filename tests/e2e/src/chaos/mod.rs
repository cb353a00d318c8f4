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
mod probe;
mod targets;
pub mod verdict;
mod victim;
mod witness;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cri::Pods;
use crate::events::Events;
use crate::figures::print_line;
use crate::node;
use census::Census;
use faults::file_systems::FileSystems;
use plan::{Fault, Phase, Step, StepId};
use verdict::Report;
use witness::Witness;

/// Number of attempts of a step whose fault does not strike.
const ATTEMPTS: u32 = 5;

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
    /// Sockets of shims that exist between two lives.
    sockets: Vec<PathBuf>,
    /// How long each request takes without a fault.
    usual: BTreeMap<&'static str, Duration>,
}

impl<'a> Shard<'a> {
    /// Starts the witness, takes the first census, and runs lives without a fault.
    #[track_caller]
    pub fn new(pods: &'a Pods) -> Self {
        let files = FileSystems::mount();
        let witness = Witness::start(pods);
        let events = Events::watch();
        let (namespaces, sockets) = (targets::network_namespaces(), targets::sockets());
        let base = Census::take();
        let mut shard = Self { pods, witness, files, base, events, namespaces, sockets, usual: BTreeMap::new() };
        shard.rehearse();
        shard
    }

    /// Runs lives without a fault. They measure the requests, and show that the checks alone find nothing. Each life
    /// ends in another way, and the last measurement of a request counts. Therefore StopPodSandbox and RemovePodSandbox
    /// are measured while the container runs, as in the phases of these names.
    #[track_caller]
    fn rehearse(&mut self) {
        print_line("rehearsal without a fault");
        let begin = Instant::now();
        for phase in [Phase::Exec, Phase::StopPodSandbox, Phase::RemovePodSandbox] {
            let id = StepId { seed: 0, shard: 0, step: 0 };
            let step = Step { id, phase, fault: Fault::Nothing, random: 0 };
            let (_, findings) = life::run(self, step, 0, judge::judge);
            assert!(findings.is_empty(), "a life without a fault has findings:\n{}", findings.join("\n"));
        }
        let usual = self.usual.iter().map(|(method, took)| format!("{method} {:.2} s", took.as_secs_f64()));
        let usual: Vec<String> = usual.collect();
        print_line(format_args!("    {:.1} s; {}", begin.elapsed().as_secs_f64(), usual.join(", ")));
    }

    /// Runs one step. Prints the step before it begins, and its result. If the fault does not strike, for example
    /// because the request has ended before, tries again with another delay.
    pub fn run(&mut self, step: Step) -> Report {
        self.run_named(step, &step.to_string(), ATTEMPTS)
    }

    fn run_named(&mut self, step: Step, name: &str, attempts: u32) -> Report {
        print_line(name);
        let begin = Instant::now();
        let mut report = Report {
            step,
            name: name.to_owned(),
            seconds: 0.0,
            misses: Vec::new(),
            struck: false,
            findings: Vec::new(),
        };
        for attempt in 0..attempts {
            let (missed, findings) = life::run(self, step, attempt, judge::judge);
            if !findings.is_empty() {
                print_line(format_args!("--- last 40 lines of containerd's log\n{}\n---", node::log_tail(40)));
                // The next lives must not report what this life has left.
                self.rebase();
            }
            report.findings.extend(findings);
            let Some(why) = missed else {
                report.struck = true;
                break;
            };
            print_line(format_args!("    did not strike: {why}"));
            report.misses.push(why);
            if !report.findings.is_empty() {
                break;
            }
        }
        report.seconds = begin.elapsed().as_secs_f64();
        print_line(format_args!("    {:.1} s{}", report.seconds, if report.struck { "" } else { ", MISSED" }));
        for finding in &report.findings {
            print_line(format_args!("    FOUND {finding}"));
        }
        report
    }

    /// Takes a new base.
    fn rebase(&mut self) {
        self.base = Census::take();
        self.namespaces = targets::network_namespaces();
        self.sockets = targets::sockets();
    }
}
