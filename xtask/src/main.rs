//! `cargo xtask`: builds, runs and tests Husk. It also does what cargo cannot do, such as building the guest kernel and
//! booting a test node.

mod bench;
mod build;
mod cargo_test;
mod chaos;
mod cli;
mod cmd;
mod conformance;
mod cpio;
mod demo;
mod deny;
mod disk_space;
mod dist;
mod extent;
mod files;
mod filter;
mod fuzz;
mod image;
mod images;
mod imports;
mod kernel;
mod libtest;
mod lock;
mod miri;
mod modules;
mod node;
mod paths;
mod pins;
mod plan;
mod results;
mod scale;
mod setup;
mod side;
mod source;
mod stages;
mod stamp;
mod suites;
mod syscalls;
mod test;
mod ui;
mod unit;
mod user_cache;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    match cli::run(command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            ui::failed(&error);
            ExitCode::FAILURE
        }
    }
}
