//! `cargo xtask bench …`: runs the benchmarks in the test node.

use anyhow::Result;
use clap::Subcommand;

use crate::build::{self, Profile};
use crate::node::{self, Add, Limits, Line, Machine, Run, Seat};
use crate::{dist, paths, setup};

/// The benchmarks.
#[derive(Subcommand)]
pub enum Bench {
    /// Measure how long a container takes to start and end with Husk, runc and runsc, and with a build of Husk whose
    /// VMM has no jail. Also measure the steps of Husk's start, and Husk's memory.
    Start {
        /// Build the programs in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of husk-bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure the throughput of a command's output through the CRI's Exec, with Husk and with runc.
    Exec {
        /// Build the programs in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of husk-bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure whether each device holds its rate limits. Fail if a rate differs from its limit by more than 5 %.
    Limits {
        /// Build the programs in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of husk-bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure the throughput, round-trip time and start-up cost of a pod's network, with vhost-net and with the VMM's
    /// data path.
    Network {
        /// Build the programs in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of husk-bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Runs a benchmark. Returns the exit code.
pub fn bench(bench: &Bench) -> Result<u8> {
    let (what, quick, args) = match bench {
        Bench::Start { quick, args } => ("start", quick, args),
        Bench::Exec { quick, args } => ("exec", quick, args),
        Bench::Limits { quick, args } => ("limits", quick, args),
        Bench::Network { quick, args } => ("network", quick, args),
    };
    setup::setup()?;
    dist::dist(Profile::quick(*quick))?;
    let programs = build::programs(&["husk-e2e"], Profile::Node)?;
    let program = build::find(&programs, &["husk-bench"])?;
    let mut add = node::images()?;
    add.push(Add::new(&program.path, "/husk/husk-bench"));
    if matches!(bench, Bench::Start { .. }) {
        let shim = build::unjailed_shim(Profile::quick(*quick))?;
        add.push(Add::new(shim.path, "/usr/local/bin/containerd-shim-husk-unjailed-v2"));
    }
    let script = paths::root().join("tests/node/bench.sh");
    let env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())];
    let mut arguments = vec![what.to_owned()];
    arguments.extend(args.iter().cloned());
    node::run(&Run {
        script,
        args: arguments,
        env,
        add,
        imported: false,
        machine: Machine::default(),
        containerd: Line::One,
        limits: Limits::default(),
        seat: Seat::default(),
    })
}
