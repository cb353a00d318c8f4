//! Chaos and soak in the test node (`cargo xtask chaos`, `cargo xtask soak`).

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use husk_e2e::chaos::plan::{self, StepId};
use husk_e2e::chaos::{Report, Shard, failpoints};
use husk_e2e::cri::pods;
use husk_e2e::soak;
use serde_json::{Value, json};

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
    },
}

fn main() -> Result<ExitCode> {
    let passed = match Cli::parse().command {
        Command::Chaos { seed, shard, from, steps } => {
            chaos(plan::shard(seed, shard).into_iter().skip(from).take(steps), |shard, step| shard.run(step))?
        }
        Command::Replay { step } => {
            chaos([plan::plan(step.seed)[step.shard * plan::STEPS + step.step]].into_iter(), |shard, step| {
                shard.run(step)
            })?
        }
        Command::Failpoints { from, steps } => {
            chaos(failpoints::all().into_iter().skip(from).take(steps), |shard, failpoint| {
                shard.run_failpoint(failpoint)
            })?
        }
        Command::Soak { first, lives } => soak(first, lives)?,
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs steps in one shard. Returns whether all have passed.
fn chaos<S>(steps: impl Iterator<Item = S>, run: impl Fn(&mut Shard<'_>, S) -> Report) -> Result<bool> {
    let mut reports: Vec<Report> = Vec::new();
    pods("chaos", |pods| {
        let mut shard = Shard::new(pods);
        for step in steps {
            reports.push(run(&mut shard, step));
            // The node can crash in the next step.
            let _ = write("chaos.json", &json!(reports.iter().map(Report::to_json).collect::<Vec<Value>>()));
        }
    });
    let found = reports.iter().filter(|report| !report.findings.is_empty()).count();
    let missed = reports.iter().filter(|report| report.missed.is_some()).count();
    println!("chaos: {} steps, {missed} could not strike, {found} with findings", reports.len());
    Ok(found == 0)
}

fn soak(first: u32, lives: u32) -> Result<bool> {
    let mut outcome = None;
    pods("soak", |pods| outcome = Some(soak::soak(pods, first, lives)));
    let outcome = outcome.context("the soak has no outcome")?;
    write("soak.json", &outcome.to_json())?;
    for resource in &outcome.resources {
        let soak::Resource { name, first, last, slope, grows } = resource;
        println!("{name}: {first} to {last}, {slope:+.4} a life{}", if *grows { ", GROWS" } else { "" });
    }
    let growing = outcome.growing().count();
    println!("soak: {} lives in {:.0} s, {growing} resources grow", outcome.lives, outcome.seconds);
    Ok(growing == 0)
}

/// Writes a result to `/out`, which is copied to the machine that runs the node.
fn write(name: &str, value: &Value) -> Result<()> {
    let path = Path::new("/out").join(name);
    fs::create_dir_all("/out").context("failed to create /out")?;
    fs::write(&path, serde_json::to_vec_pretty(value)?).with_context(|| format!("failed to write {}", path.display()))
}
