//! `cargo xtask demo`: a container of a real image in a microVM of its own, shown.

use crate::build::Profile;
use crate::node::{self, Add, Machine, Run};
use crate::{dist, images, paths, setup, ui};
use anyhow::{Context, Result};
use clap::Args;
use std::path::Path;
use std::time::Duration;

/// How it is shown.
#[derive(Args)]
pub struct Options {
    /// Build in the quick profile.
    #[arg(long)]
    quick: bool,
}

/// Builds what is needed and runs the demo; the exit code.
pub fn demo(options: &Options) -> Result<u8> {
    setup::setup()?;
    dist::dist(Profile::quick(options.quick))?;
    let mut add = Vec::new();
    for tar in images::build(&paths::state().join("images")).context("cannot make the OCI images")? {
        let name = tar.file_name().unwrap_or_default().to_owned();
        add.push(Add::new(tar, Path::new("/husk/images").join(name)));
    }
    let script = paths::root().join("tests/node/demo.sh");
    let env = vec![("HUSK_IMAGES".to_owned(), "/husk/images".to_owned())];
    ui::say("demo", "in the test node");
    let time_limit = Duration::from_secs(600);
    node::run(&Run { script, args: vec![], env, add, machine: Machine::default(), time_limit })
}
