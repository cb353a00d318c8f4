//! `cargo xtask scale`: many pods at once in the test node.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::build::{self, Profile};
use crate::node::{self, Add, Limits, Line, Machine, Run, Seat};
use crate::{dist, files, paths, setup, ui};

/// Time limits: a limit for the whole run, and a limit for the time without output. The run prints a line after each
/// batch, and the removal of all pods prints a line at its end.
const LIMITS: Limits = Limits { total: Duration::from_secs(4 * 3600), quiet: Duration::from_secs(3600) };
/// Name of the program that runs in the node.
const PROGRAM: &str = "husk-scale";
/// Name of the shim whose VMM is a stand-in. It is the name of its package, too.
const STAND_IN: &str = "husk-scale-shim";
/// Path of the shim in the node.
const SHIM: &str = "/usr/local/bin/containerd-shim-husk-v2";

/// The options of `cargo xtask scale`.
#[derive(Args)]
pub struct Options {
    /// The number of pods. Default: 500, or 100 with `--real`.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pods: Option<u32>,
    /// The number of pods of a batch. The node is measured after each batch.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// The number of pods that start at the same time.
    #[arg(long, default_value_t = 8)]
    at_once: usize,
    /// Run real pods, each with a VM. Default: real shims with a stand-in for the VMM and the guest.
    #[arg(long)]
    real: bool,
    /// The node's memory in MiB. Default: 8192, or 20480 with `--real`.
    #[arg(long)]
    memory: Option<u32>,
    /// The node's containerd line.
    #[arg(long, value_enum, default_value_t)]
    containerd: Line,
}

/// Runs the pods. Returns the exit code, which is 1 if something does not grow linearly, or if a limit is too low.
pub fn scale(options: &Options) -> Result<u8> {
    setup::setup()?;
    dist::dist(Profile::Node)?;
    let packages: &[&str] = if options.real { &["husk-e2e"] } else { &["husk-e2e", STAND_IN] };
    let programs = build::programs(packages, Profile::Node)?;
    let mut add = node::images()?;
    add.push(Add::new(&build::find(&programs, &[PROGRAM])?.path, format!("/husk/{PROGRAM}")));
    if !options.real {
        // The stand-in contains the real shim, and replaces it. Therefore containerd needs no other configuration.
        add.push(Add::new(&build::find(&programs, &[STAND_IN])?.path, SHIM));
    }
    let pods = options.pods.unwrap_or(if options.real { 100 } else { 500 });
    let memory = options.memory.unwrap_or(if options.real { 20480 } else { 8192 });
    let args = [("--pods", pods.to_string()), ("--batch", options.batch.to_string())];
    let args = args.into_iter().chain([("--at-once", options.at_once.to_string())]);
    let seat = Seat::default();
    let code = node::run(&Run {
        script: paths::root().join("tests/node/scale.sh"),
        args: args.flat_map(|(name, value)| [name.to_owned(), value]).collect(),
        env: vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())],
        add,
        imported: true,
        machine: Machine { memory, ..Machine::default() },
        containerd: options.containerd,
        limits: LIMITS,
        seat,
    })?;
    let kept = paths::state().join("scale");
    files::make_dir(&kept)?;
    let kind = if options.real { "real" } else { "stand-in" };
    for (from, to) in [("scale.json", format!("{kind}.json")), ("containerd.log", format!("{kind}.containerd.log"))] {
        let (from, to) = (seat.out_dir().join(from), kept.join(to));
        if from.exists() {
            fs::copy(&from, &to).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))?;
        }
    }
    ui::say("scale", format!("results are in {}", kept.display()));
    Ok(code)
}
