//! `cargo xtask test`: all checks, the unit tests, and the end-to-end suites in the test node.

use crate::build::{self, Profile, Program, cargo};
use crate::node::{self, Add, Crashed, Line, Machine, Run, kvm};
use crate::{cache, cmd, dist, lockfile, paths, setup, ui};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Suites that run only where the filter names one of their tests: two take longer than all others together, one needs
/// a program compiled, and what the last tries `cargo xtask conformance` compares with runc.
const SOAK: [&str; 4] = [BUILDERS, "soak", FSX, "conformance"];
/// The suite that builds images, in images of its own.
const BUILDERS: &str = "cri_builders";
/// The suite that runs the public test program for file systems, in an image of its own.
const FSX: &str = "cri_fsx";
/// Suites of what only containerd 2.x has.
const TWO_ONLY: [&str; 2] = ["cri_sandboxer", "cri_userns_handlers"];
/// What runs with containerd 2.x as well, unless all of it is asked for: a second boot is to cost two minutes.
const TWO_AS_WELL: [&str; 3] = ["cri_events", "cri_pods", "cri_userns"];
/// What runs on a host with version 1 of control groups, and there only.
const LEGACY_ONLY: &str = "cri_cgroup1";
/// So that what one leaves in the node's kernel does not reach all others; a boot costs ten seconds.
const SUITES_A_BOOT: usize = 8;
/// How often a suite that failed in an emulated node is tried again.
const MORE_TRIES: u32 = 1;
/// Where the node notes the suites that failed.
const FAILED: &str = "/out/failed";

/// What is run.
#[derive(Args)]
pub struct Options {
    /// Only the checks and the unit tests.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end suites, or those of their tests whose name contains FILTER.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    e2e: Option<String>,
    /// Run all end-to-end suites with this containerd; without it, all with 1.7 and a few with 2.x and on a host
    /// with version 1 of control groups.
    #[arg(long, value_enum, conflicts_with = "unit")]
    containerd: Option<Line>,
    /// Test the programs as they are shipped; without it they are built in the quick profile, which the suites
    /// themselves use too, so that everything is compiled once.
    #[arg(long)]
    release: bool,
}

/// Runs what was asked for; the exit code.
pub fn test(options: &Options) -> Result<u8> {
    setup::setup()?;
    if options.e2e.is_none() {
        unit()?;
    }
    if options.unit {
        ui::say("test", "all passed");
        return Ok(0);
    }
    let filter = options.e2e.as_deref().unwrap_or_default();
    let mut code = 0;
    for line in options.containerd.map_or(vec![Line::One, Line::Two, Line::Legacy], |line| vec![line]) {
        code = code.max(e2e(filter, Profile::quick(!options.release), line, options.containerd.is_some())?);
    }
    ui::say("test", if code == 0 { "all passed" } else { "end-to-end tests failed" });
    Ok(code)
}

/// Format, lints, the lock file, and the tests beside the code.
fn unit() -> Result<()> {
    ui::say("test", "Cargo.lock, format, lints");
    lockfile::check()?;
    cmd::shown(cargo().args(["fmt", "--all", "--check"]))?;
    cmd::shown(cargo().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))?;
    ui::say("test", "unit tests");
    // The end-to-end suites are a package of their own, which only the node can run.
    cmd::shown(cargo().args(["test", "--quiet", "--workspace", "--exclude", "husk-e2e", "--locked"]))
}

/// Whether a suite runs with this containerd.
fn runs(suite: &str, line: Line, all: bool, filtered: bool) -> bool {
    let soak = !filtered && SOAK.contains(&suite);
    match line {
        Line::One => !soak && !TWO_ONLY.contains(&suite) && suite != LEGACY_ONLY,
        Line::Legacy => suite == LEGACY_ONLY || (filtered && !TWO_ONLY.contains(&suite)),
        Line::Two => {
            !soak && suite != LEGACY_ONLY && (all || TWO_ONLY.contains(&suite) || TWO_AS_WELL.contains(&suite))
        }
    }
}

/// Whether a suite has a test whose name contains `filter`.
fn has(suite: &Program, filter: &str) -> Result<bool> {
    let list = cmd::output(Command::new(&suite.path).arg("--list"))
        .with_context(|| format!("suite {} does not list its tests", suite.name))?;
    Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).any(|name| name.contains(filter)))
}

/// Runs the end-to-end suites in the node.
fn e2e(filter: &str, profile: Profile, line: Line, all: bool) -> Result<u8> {
    dist::dist(profile)?;
    let suites = build::tests("husk-e2e")?;
    if suites.is_empty() {
        bail!("husk-e2e has no tests");
    }
    let mut named = Vec::new();
    for suite in &suites {
        if has(suite, filter)? {
            named.push(suite);
        }
    }
    if named.is_empty() {
        bail!("no test has a name with {filter} in it");
    }
    let chosen: Vec<&Program> =
        named.into_iter().filter(|suite| runs(&suite.name, line, all, !filter.is_empty())).collect();
    let mut failed = Vec::new();
    let a_boot = if filter.is_empty() { SUITES_A_BOOT } else { chosen.len().max(1) };
    for suites in chosen.chunks(a_boot) {
        failed.extend(boot(suites, filter, line)?);
    }
    // The worst of the emulator's flaws is kept away from (see node/boot.rs). Another one is known: the vector of an
    // interrupt that is injected with VMRUN stays noted (exception_index in helper_vmrun() of
    // target/i386/tcg/system/svm_helper.c), and is delivered again when the processor is kicked before the next #VMEXIT.
    let emulated = !matches!(kvm::judge(), kvm::Verdict::Usable { .. });
    for _ in 0..if emulated { MORE_TRIES } else { 0 } {
        if failed.is_empty() {
            break;
        }
        let names: Vec<&str> = failed.iter().map(|suite| suite.name.as_str()).collect();
        ui::say(
            "test",
            format!("UNSTEADY in an emulated node, each tried again in one of its own: {}", names.join(", ")),
        );
        let again = std::mem::take(&mut failed);
        for suite in again {
            failed.extend(boot(&[suite], filter, line)?);
        }
    }
    Ok(u8::from(!failed.is_empty()))
}

/// Runs some suites in a node of their own; those that failed, which is all of them when the node itself crashed or hung.
fn boot<'a>(suites: &[&'a Program], filter: &str, line: Line) -> Result<Vec<&'a Program>> {
    let mut add = node::images()?;
    let mut script = String::from("# Runs the suites one after another; fails when one does.\nfailed=\n");
    for Program { name, path } in suites {
        if name == BUILDERS {
            add.extend(node::builder_images()?);
        }
        if name == FSX {
            add.extend(node::fsx_image()?);
        }
        add.push(Add::new(path, format!("/husk/tests/{name}")));
        script.push_str(&format!(
            "echo \"== {name}\"\n/husk/tests/{name} --test-threads=1 \"$@\" || {{ failed=\"$failed {name}\"; echo {name} >> {FAILED}; }}\n"
        ));
    }
    script.push_str("[ -z \"$failed\" ] || { echo \"failed:$failed\"; exit 1; }\n");
    cache::make_dir(&paths::node())?;
    let path = paths::node().join("e2e.sh");
    fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    let args = if filter.is_empty() { vec![] } else { vec![filter.to_owned()] };
    let env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned()), ("RUST_BACKTRACE".into(), "1".into())];
    let time_limit = Duration::from_secs(if filter.is_empty() { 1200 } else { 2700 });
    let run = Run { script: path, args, env, add, machine: Machine::default(), containerd: line, time_limit };
    let code = match node::run(&run) {
        Err(error) if error.is::<Crashed>() => {
            ui::say("test", format!("{error:#}"));
            return Ok(suites.to_vec());
        }
        code => code?,
    };
    let path = node::out_dir().join(FAILED.trim_start_matches("/out/"));
    let failed = match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let failed: Vec<&Program> =
        suites.iter().copied().filter(|suite| failed.lines().any(|name| name == suite.name)).collect();
    if code != 0 && failed.is_empty() {
        bail!("the suites' script ended with {code}, and names none that failed");
    }
    Ok(failed)
}
