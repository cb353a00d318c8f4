//! `cargo xtask bench …`: measurements, made in the test node.

use crate::build::{self, Profile};
use crate::node::{self, Add, Limits, Line, Machine, Run, Seat};
use crate::{dist, paths, setup};
use anyhow::Result;
use clap::Subcommand;

/// What is measured.
#[derive(Subcommand)]
pub enum Bench {
    /// How long a container takes to start and end: Husk, runc and runsc side by side, and where Husk's time goes.
    Start {
        /// Build what is measured in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of the measuring program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// How fast a command's output comes through the CRI's Exec: Husk beside runc.
    Exec {
        /// Build what is measured in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of the measuring program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// What a pod's network does, carried by vhost-net and by the VMM.
    Network {
        /// Build what is measured in the quick profile.
        #[arg(long)]
        quick: bool,
        /// Arguments of the measuring program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Measures; the exit code.
pub fn bench(bench: &Bench) -> Result<u8> {
    let (what, quick, args) = match bench {
        Bench::Start { quick, args } => ("start", quick, args),
        Bench::Exec { quick, args } => ("exec", quick, args),
        Bench::Network { quick, args } => ("network", quick, args),
    };
    setup::setup()?;
    dist::dist(Profile::quick(*quick))?;
    let programs = build::programs(&["husk-e2e"], Profile::Node)?;
    let program = build::find(&programs, &["husk-bench"])?;
    let mut add = node::images()?;
    add.push(Add::new(&program.path, "/husk/husk-bench"));
    let script = paths::root().join("tests/node/bench.sh");
    let env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())];
    let mut arguments = vec![what.to_owned()];
    arguments.extend(args.iter().cloned());
    node::run(&Run {
        script,
        args: arguments,
        env,
        add,
        machine: Machine::default(),
        containerd: Line::One,
        limits: Limits::default(),
        seat: Seat::default(),
    })
}
