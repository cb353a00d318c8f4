//! `cargo xtask miri`: runs unit tests under Miri, an interpreter of Rust that detects undefined behaviour.
//!
//! Miri has only some of the kernel's system calls. A call that Miri lacks ends the whole test binary. Therefore each
//! test that makes such a call is left out: by `#[cfg_attr(miri, ignore = "REASON")]` beside the test, or, if a module
//! has many such tests, by an entry of [`left_out::MODULES`].

mod left_out;
mod report;

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo_test::{self, Binary};
use crate::{cmd, paths, ui};
use report::{LeftOut, Row};

/// The crates with most of the unsafe code, and the crates that only parse and encode messages. The other crates have
/// few unsafe blocks, and these make system calls that Miri lacks.
const CRATES: [&str; 5] = ["husk-base", "husk-netlink", "husk-policy", "husk-proto", "husk-vmm"];
/// The toolchain that has Miri.
const TOOLCHAIN: &str = "nightly";
/// Tests may read the clock, the environment and files of the host.
const FLAGS: &str = "-Zmiri-disable-isolation";
/// Number of cases of a test with random inputs, unless the test sets the number. An interpreted case takes about a
/// hundred times as long as a compiled one.
const CASES: &str = "4";
/// How to install Miri.
const REMEDY: &str = "`rustup toolchain install nightly && rustup +nightly component add miri rust-src` installs it";

/// The options of `cargo xtask miri`.
#[derive(Args)]
pub struct Options {
    /// Run only the tests whose names contain FILTER.
    filter: Option<String>,
}

/// Runs the tests and prints a table. Returns the exit code.
pub fn miri(options: &Options) -> Result<u8> {
    if !is_installed() {
        bail!("Miri is not installed; {REMEDY}");
    }
    let (binaries, table) = run(options.filter.as_deref().unwrap_or_default())?;
    print!("{table}");
    Ok(u8::from(binaries.iter().any(|binary| !binary.passed)))
}

/// Runs the tests whose names contain `filter`. Returns the results of the test binaries, and a table of them.
pub fn run(filter: &str) -> Result<(Vec<Binary>, String)> {
    ui::say("miri", format!("unit tests of {}", CRATES.join(", ")));
    let left_out = left_out(filter)?;
    let mut command = miri_test(&CRATES);
    command.args(["--no-fail-fast", "--"]);
    for (_, module, _) in left_out::MODULES {
        command.args(["--skip", module]);
    }
    command.args((!filter.is_empty()).then_some(filter));
    let binaries = cargo_test::run("miri", &mut command)?;
    let rows: Vec<Row> = binaries.iter().map(|binary| Row::new(binary, &left_out)).collect();
    Ok((binaries, report::table(&rows)))
}

fn is_installed() -> bool {
    let mut command = cargo();
    command.args(["miri", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Returns a command that starts the cargo of the toolchain that has Miri.
fn cargo() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", TOOLCHAIN, "cargo"]).current_dir(paths::root());
    // The cargo that started xtask has set these variables to its own paths.
    for variable in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(variable);
    }
    command.env("MIRIFLAGS", FLAGS).env("PROPTEST_CASES", CASES);
    command
}

/// Returns the command `cargo miri test` for the unit tests of these crates.
fn miri_test(crates: &[&str]) -> Command {
    let mut command = cargo();
    command.args(["miri", "test", "--lib", "--locked"]);
    for name in crates {
        command.args(["--package", name]);
    }
    // Miri's build of the crates differs from other builds. Its own target directory keeps cargo from locking out
    // other builds.
    command.arg("--target-dir").arg(paths::state().join("miri"));
    command
}

/// For each module that is left out, returns the number of tests whose names contain `filter`. Fails if such a module
/// has no test.
fn left_out(filter: &str) -> Result<Vec<LeftOut>> {
    let mut crates: Vec<&str> = left_out::MODULES.iter().map(|(name, _, _)| *name).collect();
    crates.dedup();
    let mut found = Vec::new();
    for name in crates {
        let mut list = miri_test(&[name]);
        list.args(["--quiet", "--", "--list"]);
        let list = cmd::output(&mut list).with_context(|| format!("failed to list the tests of {name} under Miri"))?;
        let tests: Vec<&str> = list.lines().filter_map(|line| line.strip_suffix(": test")).collect();
        for (_, module, reason) in left_out::MODULES.iter().filter(|(of, _, _)| *of == name) {
            let in_module = || tests.iter().filter(|test| test.contains(module));
            if in_module().next().is_none() {
                bail!("module `{module}` of {name} has no tests; remove it from xtask/src/miri/left_out.rs");
            }
            let count = in_module().filter(|test| test.contains(filter)).count();
            if count > 0 {
                found.push(LeftOut { binary: name.replace('-', "_"), reason: (*reason).to_owned(), count });
            }
        }
    }
    Ok(found)
}
