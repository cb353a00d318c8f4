//! Builds the workspace's programs for the guest and the node. All programs are static and are built with the same
//! flags, so that cargo can reuse the dependencies that it has compiled.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{paths, ui};

/// The target triple of all programs that run in the guest, the node or a test node.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Compiler flags for static programs.
pub const STATIC: &str = "-C target-feature=+crt-static";

/// A cargo profile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// The profile of shipped programs.
    Release,
    /// The quick profile, for the test node. Its programs are less optimised, but faster to build.
    Node,
}

impl Profile {
    /// Returns the quick profile if `quick` is true, and otherwise the profile of shipped programs.
    pub fn quick(quick: bool) -> Self {
        if quick { Profile::Node } else { Profile::Release }
    }

    /// Returns cargo's name of the profile.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Release => "release",
            Profile::Node => "node",
        }
    }
}

/// A program that cargo built.
pub struct Program {
    /// The name of the binary or test binary.
    pub name: String,
    /// The path of the executable.
    pub path: PathBuf,
}

/// Returns a command that starts the same cargo that started xtask.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root());
    // `cargo run` sets these variables for xtask. A nested cargo must not inherit them.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// Returns the command `cargo <what>`, which builds static programs for [`TARGET`].
fn static_cargo(what: &str, profile: Profile) -> Command {
    let mut command = cargo();
    command.args([what, "--target", TARGET, "--profile", profile.name()]);
    command.env("RUSTFLAGS", STATIC);
    // libseccomp comes from the distribution. Its static library is in the multiarch directory.
    command.env("LIBSECCOMP_LINK_TYPE", "static").env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu");
    command
}

/// Builds the binaries of `packages` in one cargo run.
pub fn programs(packages: &[&str], profile: Profile) -> Result<Vec<Program>> {
    let mut command = static_cargo("build", profile);
    command.arg("--bins");
    for package in packages {
        command.args(["--package", package]);
    }
    ui::say("build", format!("{} ({}, static)", packages.join(", "), profile.name()));
    run(command, false)
}

/// Builds a shim whose VMM has no jail, for `cargo xtask bench start`.
pub fn unjailed_shim(profile: Profile) -> Result<Program> {
    let mut command = static_cargo("build", profile);
    command.args(["--bins", "--package", "husk-shim", "--features", "husk-shim/unjailed"]);
    // The shipped shim has the same file name. The separate target directory keeps cargo from overwriting the shipped
    // shim.
    command.arg("--target-dir").arg(paths::state().join("unjailed"));
    ui::say("build", format!("husk-shim without the jail ({}, static)", profile.name()));
    run(command, false)?.pop().context("cargo built no shim")
}

/// Builds a shim and an agent with failpoints, for `cargo xtask chaos --failpoints`.
pub fn with_failpoints(profile: Profile) -> Result<Vec<Program>> {
    let mut command = static_cargo("build", profile);
    command.args(["--bins", "--package", "husk-shim", "--package", "husk-agent"]);
    command.args(["--features", "husk-shim/failpoints,husk-agent/failpoints"]);
    // A separate target directory, so that no program with failpoints gets into `dist/root`.
    command.arg("--target-dir").arg(paths::state().join("failpoints"));
    ui::say("build", format!("husk-shim and husk-agent with failpoints ({}, static)", profile.name()));
    run(command, false)
}

/// Builds the test programs of `package`, without running them.
pub fn tests(package: &str) -> Result<Vec<Program>> {
    let mut command = static_cargo("test", Profile::Node);
    // The package's binaries have no tests. Only its library and the suites have tests.
    command.args(["--no-run", "--lib", "--test", "*", "--package", package]);
    ui::say("build", format!("tests of {package} (static)"));
    run(command, true)
}

/// Builds the test program `name` of `package`, without running it.
pub fn test(package: &str, name: &str) -> Result<Program> {
    let mut command = static_cargo("test", Profile::Node);
    command.args(["--no-run", "--test", name, "--package", package]);
    ui::say("build", format!("test {name} of {package} (static)"));
    run(command, true)?.pop().with_context(|| format!("failed to find test program {name} of {package}"))
}

/// Runs cargo and returns the programs that cargo's messages name. Returns only test programs if `tests` is true, and
/// otherwise only binaries.
pub fn run(mut command: Command, tests: bool) -> Result<Vec<Program>> {
    command.arg("--message-format=json-render-diagnostics").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("failed to start cargo")?;
    let stdout = child.stdout.take().context("failed to get cargo's stdout")?;
    let mut programs = Vec::new();
    for line in BufReader::new(stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(&line?) else { continue };
        if message.get("reason").and_then(Value::as_str) != Some("compiler-artifact") {
            continue;
        }
        // Cargo builds a package's programs along with its tests. Only the kind that `tests` selects is collected.
        if message.pointer("/profile/test").and_then(Value::as_bool) != Some(tests) {
            continue;
        }
        let name = message.pointer("/target/name").and_then(Value::as_str);
        let path = message.get("executable").and_then(Value::as_str);
        if let (Some(name), Some(path)) = (name, path) {
            programs.push(Program { name: name.into(), path: path.into() });
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("cargo ended with {status}; its messages are above");
    }
    Ok(programs)
}

/// Returns the program whose name is one of `names`. Earlier names take precedence.
pub fn find<'a>(programs: &'a [Program], names: &[&str]) -> Result<&'a Program> {
    names
        .iter()
        .find_map(|name| programs.iter().find(|p| p.name == *name))
        .with_context(|| format!("failed to find a program called {} among those that cargo built", names.join(" or ")))
}
