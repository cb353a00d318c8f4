//! Chaos and soak in the test node (`cargo xtask chaos`, `cargo xtask soak`).

use std::os::fd::BorrowedFd;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use husk_e2e::chaos::plan::{self, StepId};
use husk_e2e::chaos::verdict::{Report, Tally};
use husk_e2e::chaos::{Shard, failpoints};
use husk_e2e::cri::{pods, pods_with_handler};
use husk_e2e::soak;
use nix::unistd::write;

/// Chaos and soak in the test node.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the faults of one shard of a seed.
    Chaos {
        /// The seed.
        #[arg(long)]
        seed: u64,
        /// The shard.
        #[arg(long)]
        shard: usize,
        /// Number of the first step.
        #[arg(long, default_value_t = 0)]
        from: usize,
        /// Number of steps.
        #[arg(long, default_value_t = plan::STEPS)]
        steps: usize,
    },
    /// Runs one fault again.
    Replay {
        /// The step, as SEED:SHARD:STEP.
        step: StepId,
    },
    /// Runs each action at each failpoint.
    Failpoints {
        /// Number of the first step.
        #[arg(long, default_value_t = 0)]
        from: usize,
        /// Number of steps.
        #[arg(long, default_value_t = usize::MAX)]
        steps: usize,
    },
    /// Creates and removes pods.
    Soak {
        /// Number of the first life.
        #[arg(long, default_value_t = 0)]
        first: u32,
        /// Number of lives.
        #[arg(long)]
        lives: u32,
        /// Number of lives at the same time.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        at_once: u32,
        /// The handler of the runtime.
        #[arg(long, default_value = "husk")]
        handler: String,
    },
}

/// The node's status port. The node's init opens it, and `cargo xtask` reads it.
const STATUS_FD: i32 = 9;

fn main() -> Result<ExitCode> {
    let passed = match Cli::parse().command {
        Command::Chaos { seed, shard, from, steps } => {
            chaos(plan::shard(seed, shard).into_iter().skip(from).take(steps), |shard, step| shard.run(step))?
        }
        Command::Replay { step } => {
            let steps = plan::shard(step.seed, step.shard).into_iter().skip(step.step).take(1);
            chaos(steps, |shard, step| shard.run(step))?
        }
        Command::Failpoints { from, steps } => {
            chaos(failpoints::all().into_iter().skip(from).take(steps), |shard, failpoint| {
                shard.run_failpoint(failpoint)
            })?
        }
        Command::Soak { first, lives, at_once, handler } => soak(first, lives, at_once, &handler)?,
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs steps in one shard. Returns whether the run has passed.
fn chaos<S>(steps: impl Iterator<Item = S>, run: impl Fn(&mut Shard<'_>, S) -> Report) -> Result<bool> {
    let mut steps = steps.peekable();
    ensure!(steps.peek().is_some(), "no step is selected");
    let mut reports: Vec<Report> = Vec::new();
    pods("chaos", |pods| {
        let mut shard = Shard::new(pods);
        for step in steps {
            let report = run(&mut shard, step);
            // The node can crash in the next step, and the run can be cut.
            keep(&report.to_json().to_string());
            reports.push(report);
        }
    });
    let tally = Tally::of(&reports);
    println!("chaos: {} steps, {tally}", reports.len());
    Ok(tally.passes())
}

fn soak(first: u32, lives: u32, at_once: u32, handler: &str) -> Result<bool> {
    let least = soak::least_lives(at_once);
    ensure!(lives >= least, "{lives} lives are too few to judge a growth; with {at_once} at once, it takes {least}");
    let mut outcome = None;
    pods_with_handler("soak", handler, |pods| outcome = Some(soak::soak(pods, first, lives, at_once)));
    let outcome = outcome.context("the soak has no outcome")?;
    keep(&outcome.to_json().to_string());
    for resource in outcome.resources.iter().chain(&outcome.slabs) {
        let soak::Resource { name, first, last, slope, grows, .. } = resource;
        println!("{name}: {first} to {last}, {slope:+.4} a life{}", if *grows { ", GROWS" } else { "" });
    }
    let growing = outcome.growing().count();
    println!("soak: {} lives in {:.0} s, {growing} resources grow", outcome.lives, outcome.seconds);
    Ok(growing == 0)
}

/// Passes a result, which is one line of JSON, to `cargo xtask` at once.
fn keep(result: &str) {
    let line = format!("mark result {result}\n");
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        // SAFETY: this program never closes the fd. If nobody has opened it, the call fails.
        let port = unsafe { BorrowedFd::borrow_raw(STATUS_FD) };
        match write(port, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return println!("failed to pass a result to xtask: {error}"),
        }
    }
}
