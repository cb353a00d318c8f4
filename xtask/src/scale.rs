//! `cargo xtask scale`: many pods at once in the test node.

use std::time::Duration;

use anyhow::{Result, ensure};
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
    /// The number of pods of a batch. The node is measured after each batch, and there have to be six batches. Default:
    /// 25, or 10 with `--real`.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
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

/// Minimum number of batches (`tests/e2e/src/scale/line.rs`). With fewer batches, no slopes can be compared.
const BATCHES: u32 = 6;

impl Options {
    /// Returns the number of pods, and the number of pods of a batch.
    fn sizes(&self) -> Result<(u32, u32)> {
        let pods = self.pods.unwrap_or(if self.real { 100 } else { 500 });
        let batch = self.batch.unwrap_or(if self.real { 10 } else { 25 });
        let batches = pods.div_ceil(batch);
        ensure!(
            batches >= BATCHES,
            "{pods} pods in batches of {batch} give {batches} samples, which are too few to find non-linear growth; \
             `--batch {}` gives enough",
            (pods / BATCHES).max(1)
        );
        Ok((pods, batch))
    }
}

/// Runs the pods. Returns the exit code, which is 1 if something does not grow linearly, or if a limit is too low.
pub fn scale(options: &Options) -> Result<u8> {
    let (pods, batch) = options.sizes()?;
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
    let memory = options.memory.unwrap_or(if options.real { 20480 } else { 8192 });
    let args = [("--pods", pods.to_string()), ("--batch", batch.to_string())];
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
        seat.keep(from, &kept.join(to))?;
    }
    ui::say("scale", format!("results are in {}", kept.display()));
    Ok(code)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn sizes(args: &[&str]) -> Result<(u32, u32)> {
        Cli::try_parse_from(["scale"].iter().chain(args))?.options.sizes()
    }

    #[test]
    fn there_are_enough_batches_to_find_non_linear_growth() {
        assert_eq!(sizes(&[]).unwrap(), (500, 25));
        assert_eq!(sizes(&["--real"]).unwrap(), (100, 10));
        assert_eq!(sizes(&["--pods", "48", "--batch", "8"]).unwrap(), (48, 8));
        let error = sizes(&["--real", "--batch", "25"]).unwrap_err().to_string();
        assert!(error.contains("4 samples") && error.contains("`--batch 16`"), "{error}");
        assert!(sizes(&["--pods", "5", "--batch", "1"]).is_err());
    }
}
