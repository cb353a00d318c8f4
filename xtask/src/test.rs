//! `cargo xtask test`: all checks, the unit tests, and the end-to-end suites in the test node.

use crate::build::{self, Profile, Program, cargo};
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Run, Seat, kvm};
use crate::plan::{self, Outcome, Plan};
use crate::{cache, cmd, dist, kernel, lockfile, setup, side, ui};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::process::Command;

/// Suites that run only where the filter names one of their tests: two take longer than all others together, one needs
/// a program compiled, and what the last tries `cargo xtask conformance` compares with runc.
const SOAK: [&str; 4] = [BUILDERS, "soak", FSX, "conformance"];
/// The suite that builds images, in images of its own.
const BUILDERS: &str = "cri_builders";
/// The suite that runs the public test program for file systems, in an image of its own.
const FSX: &str = "cri_fsx";
/// Tests that run only where `--all`, a containerd or a name asks for them: in an emulated node each takes half a minute
/// to a minute and a half, and shorter ones are about the same parts.
const LONG: [&str; 6] = [
    "a_guest_that_walks_through_many_files_keeps_its_machine",
    "a_pod_can_walk_through_more_files_than_can_be_open",
    "a_pod_shrinks_below_its_start",
    "huge_pages_of_a_container_are_limited",
    "sockets_and_locks_work_however_a_container_has_its_volume",
    "there_is_no_limit_on_entries_nor_on_their_size",
];
/// Suites of what only containerd 2.x has.
const TWO_ONLY: [&str; 2] = ["cri_sandboxer", "cri_userns_handlers"];
/// What runs with containerd 2.x as well, unless all of it is asked for: a second boot is to cost two minutes.
const TWO_AS_WELL: [&str; 2] = ["cri_events", "cri_pods"];
/// What runs with containerd 2.x in place of 1.7, unless all of either is asked for.
const TWO_INSTEAD: [&str; 2] = ["cri_restart", "cri_userns"];
/// What runs on a host with version 1 of control groups, and there only.
const LEGACY_ONLY: &str = "cri_cgroup1";
/// What runs on a host with systemd, and there only.
const SYSTEMD_ONLY: &str = "cri_systemd";
/// What runs where nobody says which.
const LINES: [Line; 4] = [Line::One, Line::Two, Line::Legacy, Line::Systemd];
/// So that what one leaves in the node's kernel does not reach all others, and nodes side by side are done at about the
/// same time; a boot costs half a minute, most of it for unpacking images.
const SUITES_A_BOOT: usize = 12;
/// How long some suites may take in all, and one test of theirs; the longest take six and two minutes.
const LIMITS: Limits = Limits::secs(1200, 300);

/// What is run.
#[derive(Args)]
pub struct Options {
    /// Only the checks and the unit tests.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end suites, or those of their tests whose name contains FILTER.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    e2e: Option<String>,
    /// Run all end-to-end suites with this containerd; without it, those with 1.7 and a few with 2.x, on a host
    /// with version 1 of control groups and on one with systemd.
    #[arg(long, value_enum, conflicts_with = "unit")]
    containerd: Option<Line>,
    /// Run the long tests too, and with 1.7 what runs with 2.x only otherwise.
    #[arg(long, conflicts_with_all = ["unit", "containerd"])]
    all: bool,
    /// Have the pods run by this handler of containerd's (`husk-sandbox`: the shim is the sandbox, with 2.x).
    #[arg(long, requires = "containerd")]
    handler: Option<String>,
    /// Test the programs as they are shipped; without it they are built in the quick profile, which the suites
    /// themselves use too, so that everything is compiled once.
    #[arg(long)]
    release: bool,
}

/// Runs what was asked for; the exit code.
pub fn test(options: &Options) -> Result<u8> {
    setup::setup()?;
    if options.e2e.is_none() {
        format()?;
        if options.unit {
            unit()?;
            ui::say("test", "all passed");
            return Ok(0);
        }
        // Cargo often has work for one processor only, and a package server has none.
        std::thread::scope(|scope| {
            let parts = scope.spawn(parts);
            unit()?;
            parts.join().unwrap_or_else(|_| bail!("making the node's parts was given up"))
        })?;
    }
    let filter = options.e2e.as_deref().unwrap_or_default();
    let code = e2e(filter, options)?;
    ui::say("test", if code == 0 { "all passed" } else { "end-to-end tests failed" });
    Ok(code)
}

/// What is seen without compiling anything.
fn format() -> Result<()> {
    ui::say("test", "Cargo.lock, format");
    lockfile::check()?;
    cmd::shown(cargo().args(["fmt", "--all", "--check"]))
}

/// Lints, and the tests beside the code.
fn unit() -> Result<()> {
    ui::say("test", "lints");
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

/// What the suites need that is not cargo's to make.
fn parts() -> Result<()> {
    kernel::kernel()?;
    node::prepare()?;
    node::images().map(drop)
}

/// How much is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Extent {
    /// What every change has to pass.
    Change,
    /// The long tests too.
    All,
    /// All there is with one containerd.
    Line,
}

/// Whether a suite runs with this containerd; with `filtered` it has a test that was named.
fn runs(suite: &str, line: Line, extent: Extent, filtered: bool) -> bool {
    let soak = !filtered && SOAK.contains(&suite);
    let in_one = |some: &[&[&str]]| some.iter().any(|some| some.contains(&suite));
    match line {
        // What is meant for systemd's control groups or for version 1 of them finds neither elsewhere.
        _ if suite == LEGACY_ONLY => line == Line::Legacy,
        _ if suite == SYSTEMD_ONLY => line == Line::Systemd,
        _ if soak => false,
        Line::One => !in_one(&[&TWO_ONLY]) && (filtered || extent > Extent::Change || !in_one(&[&TWO_INSTEAD])),
        Line::Two => extent == Extent::Line || in_one(&[&TWO_ONLY, &TWO_AS_WELL, &TWO_INSTEAD]),
        Line::Legacy => filtered && extent == Extent::Line && !in_one(&[&TWO_ONLY]),
        Line::Systemd => filtered && extent == Extent::Line,
    }
}

/// Whether a suite has a test whose name contains `filter` and that is not left out.
fn has(suite: &Program, filter: &str, left_out: &[&str]) -> Result<bool> {
    let list = cmd::output(Command::new(&suite.path).arg("--list"))
        .with_context(|| format!("suite {} does not list its tests", suite.name))?;
    let mut tests = list.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(tests.any(|name| name.contains(filter) && !left_out.contains(&name)))
}

/// Runs the end-to-end suites in nodes side by side.
fn e2e(filter: &str, options: &Options) -> Result<u8> {
    dist::dist(Profile::quick(!options.release))?;
    let suites = build::tests("husk-e2e")?;
    if suites.is_empty() {
        bail!("husk-e2e has no tests");
    }
    let extent = match options {
        Options { containerd: Some(_), .. } => Extent::Line,
        Options { all: true, .. } => Extent::All,
        _ => Extent::Change,
    };
    let left_out = if filter.is_empty() && extent == Extent::Change { &LONG[..] } else { &[] };
    let mut named = Vec::new();
    for suite in &suites {
        if has(suite, filter, left_out)? {
            named.push(suite);
        }
    }
    if named.is_empty() {
        bail!("no test has a name with {filter} in it");
    }
    // The worst of the emulator's flaws is kept away from (see node/boot.rs). Another one is known: the vector of an
    // interrupt that is injected with VMRUN stays noted (exception_index in helper_vmrun() of
    // target/i386/tcg/system/svm_helper.c), and is delivered again when the processor is kicked before the next #VMEXIT.
    let emulated = !matches!(kvm::judge(), kvm::Verdict::Usable { .. });
    let plan = |line: Line| {
        let chosen = named.iter().filter(|suite| runs(&suite.name, line, extent, !filter.is_empty()));
        let names: Vec<String> = chosen.map(|suite| suite.name.clone()).collect();
        let a_boot = if filter.is_empty() { SUITES_A_BOOT } else { names.len() };
        (line, Plan::new(names, a_boot, emulated))
    };
    let lines = options.containerd.map_or(LINES.to_vec(), |line| vec![line]);
    let plans = side::by_side(
        lines.into_iter().map(plan).collect(),
        |plans: &mut Vec<(Line, Plan)>| plan::next(plans),
        |seat, (line, names)| {
            let suites = names.iter().filter_map(|name| named.iter().copied().find(|suite| suite.name == *name));
            let named = Named { filter, left_out };
            boot(seat, &suites.collect::<Vec<_>>(), &named, *line, options.handler.as_deref())
        },
        |plans, (line, _), outcomes| {
            if let Some((_, plan)) = plans.iter_mut().find(|(of, _)| *of == line) {
                plan.ended(outcomes);
            }
        },
    )?;
    let mut code = 0;
    for (line, plan) in &plans {
        for (what, names) in [("UNSTEADY in an emulated node, tried again", plan.unsteady()), ("failed", plan.failed())]
        {
            if !names.is_empty() {
                ui::say("test", format!("{what} ({line:?}): {}", names.join(", ")));
            }
        }
        code = code.max(u8::from(!plan.failed().is_empty()));
    }
    Ok(code)
}

/// Which tests of a suite run.
struct Named<'a> {
    /// What their names have in them.
    filter: &'a str,
    /// Those that do not.
    left_out: &'a [&'a str],
}

/// Runs some suites in a node of their own; what became of each.
fn boot(
    seat: Seat,
    suites: &[&Program],
    named: &Named<'_>,
    line: Line,
    handler: Option<&str>,
) -> Result<Vec<(String, Outcome)>> {
    let mut add = node::images()?;
    let mut script = String::from("# Runs the suites one after another; fails when one does.\nfailed=0\n");
    for Program { name, path } in suites {
        if name == BUILDERS {
            add.extend(node::builder_images()?);
        }
        if name == FSX {
            add.extend(node::fsx_image()?);
        }
        add.push(Add::new(path, format!("/husk/tests/{name}")));
        script.push_str(&format!(
            "echo \"== {name}\"; echo \"mark begun {name}\" >&9\n\
             if /husk/tests/{name} --test-threads=1 \"$@\" 9>&-; then echo \"mark passed {name}\" >&9\n\
             else failed=1; echo \"mark failed {name}\" >&9; fi\n"
        ));
    }
    script.push_str("exit $failed\n");
    cache::make_dir(&seat.dir())?;
    let path = seat.dir().join("e2e.sh");
    fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    let mut args: Vec<String> = named.left_out.iter().flat_map(|name| ["--skip", name]).map(String::from).collect();
    args.extend((!named.filter.is_empty()).then(|| named.filter.to_owned()));
    let mut env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned()), ("RUST_BACKTRACE".into(), "1".into())];
    env.extend(handler.map(|handler| ("HUSK_E2E_HANDLER".to_owned(), handler.to_owned())));
    let limits = if named.filter.is_empty() { LIMITS } else { Limits::default() };
    let run = Run { script: path, args, env, add, machine: Machine::default(), containerd: line, limits, seat };
    let mut outcomes: Vec<(String, Outcome)> =
        suites.iter().map(|suite| (suite.name.clone(), Outcome::Waiting)).collect();
    let end = node::run_marked(&run, &mut |mark| note(&mut outcomes, mark));
    match end {
        Err(error) if error.is::<Crashed>() => ui::say("test", format!("{error:#}")),
        end => drop(end?),
    }
    Ok(outcomes)
}

/// Notes what the script marked: "begun", "passed" or "failed", and a suite.
fn note(outcomes: &mut [(String, Outcome)], mark: &str) {
    let Some((word, name)) = mark.split_once(' ') else { return };
    let outcome = match word {
        "begun" => Outcome::Begun,
        "passed" => Outcome::Passed,
        "failed" => Outcome::Failed,
        _ => return,
    };
    for (suite, noted) in outcomes {
        if suite == name {
            *noted = outcome;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_run_where_they_belong() {
        let lines = |suite: &str, extent, filtered| -> Vec<Line> {
            LINES.into_iter().filter(|line| runs(suite, *line, extent, filtered)).collect()
        };
        let plain = |suite| lines(suite, Extent::Change, false);
        assert_eq!(plain("process"), [Line::One]);
        assert_eq!(plain("cri_pods"), [Line::One, Line::Two]);
        assert_eq!(plain("cri_userns"), [Line::Two]);
        assert_eq!(lines("cri_userns", Extent::All, false), [Line::One, Line::Two]);
        assert_eq!(plain("cri_sandboxer"), [Line::Two]);
        assert_eq!(plain("cri_cgroup1"), [Line::Legacy]);
        assert_eq!(plain("cri_systemd"), [Line::Systemd]);
        assert!(plain("soak").is_empty() && lines("soak", Extent::All, false).is_empty());
        assert_eq!(lines("soak", Extent::Change, true), [Line::One]);
        assert_eq!(lines("process", Extent::Line, false), [Line::One, Line::Two]);
        assert_eq!(lines("process", Extent::Line, true), LINES);
    }

    #[test]
    fn long_tests_are_called_so() {
        let dir = crate::paths::root().join("tests/e2e/tests");
        let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let suites = files.filter(|path| path.extension().is_some_and(|ending| ending == "rs"));
        let all: String = suites.map(|path| fs::read_to_string(path).unwrap()).collect();
        for name in LONG {
            assert!(all.contains(&format!("\nfn {name}() {{")), "no suite has a test {name}");
        }
    }
}
