//! Many pods at once in the test node (`cargo xtask scale`).

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use husk_e2e::cri::pods;
use husk_e2e::scale::pods::{Options, run};

/// Many pods at once in the test node.
#[derive(Parser)]
struct Cli {
    /// Number of pods.
    #[arg(long)]
    pods: u32,
    /// Number of pods of a batch. The node is measured after each batch.
    #[arg(long)]
    batch: u32,
    /// Number of pods that start at the same time.
    #[arg(long)]
    at_once: usize,
}

fn main() -> Result<ExitCode> {
    let Cli { pods: count, batch, at_once } = Cli::parse();
    let mut outcome = Err("the run has no outcome".to_owned());
    pods("scale", |pods| outcome = run(pods, Options { pods: count, batch, at_once }));
    let outcome = outcome.map_err(|error| anyhow!(error))?;
    fs::create_dir_all("/out").context("failed to create /out")?;
    fs::write("/out/scale.json", serde_json::to_vec_pretty(&outcome.to_json())?)
        .context("failed to write /out/scale.json")?;
    println!("{}", outcome.report());
    println!("scale: {} pods, {} findings", outcome.pods, outcome.findings.len());
    Ok(if outcome.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
