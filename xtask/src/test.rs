//! `cargo xtask test`: all checks, the unit tests, and the end-to-end suites in the test node.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::build::{self, Profile, Program};
use crate::extent::{Extent, LINES, runs};
use crate::filter::Filter;
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Run, Seat, kvm};
use crate::plan::{self, Outcome, Plan, Retries};
use crate::results::{AttemptOutcome, BootReport, E2eSummary, Recorder, Results, SuiteOutcome, Summary};
use crate::stages::{self, Stages};
use crate::suites;
use crate::unit::Unit;
use crate::{dist, files, image, kernel, paths, setup, side, syscalls, ui};

/// The suite whose containers build images. The suite needs additional images.
const BUILDERS: &str = "cri_builders";
/// The suite that runs fsx, a public test program for file systems. The suite needs an additional image.
const FSX: &str = "cri_fsx";
/// The suite with hostile guests. The suite needs the test program `hostile` of `husk-vmm`, which attacks the VMM's
/// devices, and an initramfs with a lying agent.
const HOSTILE: &str = "husk_hostile";
/// The suite with saved VMs. The suite needs the test program `saved` of `husk-vmm`.
const SAVED: &str = "husk_saved";
/// Maximum number of suites per boot if only one node runs at a time. With this maximum, two boots are enough for all
/// suites of containerd 1.7. Each boot costs ten seconds, and more if the node has to import the images. Boots with
/// fewer suites would also have advantages. Kernel state that a suite leaves behind affects only the suites of the same
/// boot, and would thus affect fewer suites. Results, which are written after each boot, would be available sooner.
const SUITES_A_BOOT: usize = 20;
/// Maximum number of suites per boot if nodes run side by side. With this maximum, the nodes end at about the same
/// time.
const SUITES_A_BOOT_BESIDE: usize = 12;
/// Time limits of a boot: a limit for all its suites together, and a limit on the time without output. The limit on the
/// time without output applies to a single test. The longest boot takes fifteen minutes, and the longest test takes two
/// minutes.
const LIMITS: Limits = Limits::secs(2400, 300);

/// Makes the template for pods without limits in the node.
const MAKE_TEMPLATE: &str = "sed -i 's/^template = .*/template = \"manual\"/' /etc/husk/config.toml\n\
                             husk template build && husk template list || exit 1\n";

/// Prints how many of the ended pods had a guest from the template. The pods of some suites all have limits.
const COUNT_CLONES: &str = "ended=$(grep -c 'timeline in ms' /var/log/containerd.log)\n\
                            clones=$(grep 'timeline in ms' /var/log/containerd.log | grep -c 'template restored')\n\
                            echo \"$clones of $ended guests were made from the template\"\n";

/// Number of slowest tests that a run lists at its end.
const SLOWEST: usize = 15;

/// The options of `cargo xtask test`.
#[derive(Args)]
pub struct Options {
    /// Run only the checks and the unit tests.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Run only the end-to-end suites. With FILTER, run only the tests whose name contains FILTER. With @SUITE,SUITE…,
    /// run only the tests of these suites.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    e2e: Option<String>,
    /// List the end-to-end suites, their tests and what each suite needs, and run nothing. FILTER selects tests, as
    /// with --e2e.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "", exclusive = true)]
    list: Option<String>,
    /// Run the end-to-end suites only with this containerd line. With 1.7 or 2, all suites that support this line run.
    /// Default: most suites run with 1.7 only. Some suites run with 2, instead of 1.7 or in addition to 1.7. A few
    /// suites run only with 1.7-cgroup1 (a node with cgroup v1) or 2-systemd (a node with systemd).
    #[arg(long, value_enum, conflicts_with = "unit")]
    containerd: Option<Line>,
    /// Also run the long tests. Suites that support 1.7, but by default run only with 2.x, then run with both lines.
    #[arg(long, conflicts_with_all = ["unit", "containerd"])]
    all: bool,
    /// Do not retry a suite that failed. Default: in an emulated node, a suite that failed is retried once.
    #[arg(long, conflicts_with = "unit")]
    no_retry: bool,
    /// Run the pods with this handler of containerd's configuration. With the handler `husk-sandbox` of containerd 2.x,
    /// the shim is the sandbox controller.
    #[arg(long, requires = "containerd")]
    handler: Option<String>,
    /// Build the tested programs in the profile of the shipped programs. Default: build them in the quick profile. The
    /// suites always use the quick profile, so that by default everything is compiled only once.
    #[arg(long)]
    release: bool,
    /// Make the seccomp filters log the system calls that they do not allow, instead of blocking these calls. At the
    /// end, list the rules that no suite needed. Fail if a filter did not allow a call that a suite made.
    #[arg(long, requires = "e2e")]
    syscalls: bool,
    /// Make a template in each node, and let the guests of pods without limits be made from it.
    #[arg(long, requires = "e2e")]
    templates: bool,
}

/// The result of a run.
struct End {
    /// The exit code.
    code: u8,
    /// The last lines that the run prints.
    notes: Vec<String>,
}

/// Runs what the options ask for. Returns the exit code.
pub fn test(options: &Options) -> Result<u8> {
    if let Some(filter) = &options.list {
        print!("{}", suites::list(&suites::read()?, Filter::parse(filter))?);
        return Ok(0);
    }
    let stages = Stages::new();
    let end = run(options, &stages);
    ui::say("test", "where the time went, in seconds:");
    eprint!("{}", stages::table(&stages.list(), stages.elapsed()));
    let End { code, notes } = end?;
    for note in notes {
        ui::say("test", note);
    }
    Ok(code)
}

fn run(options: &Options, stages: &Stages) -> Result<End> {
    let passed = || "all passed".to_owned();
    // `Results::new` also removes the results of an earlier run, and so does `Unit::new`. Otherwise, if this run failed
    // before its first suite, the old results would look like results of this run.
    let results = if options.unit { None } else { Some(Results::new(paths::results())?) };
    let unit = if options.e2e.is_none() { Some(Unit::new(stages)?) } else { None };
    stages.measure("setup", setup::setup)?;
    let end_to_end = |results, stop: &AtomicBool| -> Result<End> {
        let filter = options.e2e.as_deref().unwrap_or_default();
        let mut end = e2e(Filter::parse(filter), options, stages, results, stop)?;
        end.notes.push(if end.code == 0 { passed() } else { "end-to-end tests failed".to_owned() });
        Ok(end)
    };
    let stop = AtomicBool::new(false);
    let Some(mut unit) = unit else { return end_to_end(results.unwrap_or_default(), &stop) };
    unit.format()?;
    let Some(results) = results else {
        unit.lints()?;
        unit.unit_tests()?;
        return Ok(End { code: 0, notes: vec![passed()] });
    };
    thread::scope(|scope| {
        // Cargo often keeps only one processor busy, and a download keeps no processor busy. Therefore the node's
        // files, which have to be downloaded, are made while cargo runs.
        let parts = scope.spawn(|| stages.measure("files of the node (beside other stages)", parts));
        unit.lints()?;
        // An emulated node keeps 1.3 processors busy, and most unit tests keep one busy. Therefore the unit tests run
        // while the first node runs. If a unit test fails, no further node is booted.
        let unit_tests = scope.spawn(|| {
            let tested = unit.unit_tests();
            stop.store(tested.is_err(), Ordering::Relaxed);
            tested
        });
        joined(parts, "makes the node's files")?;
        let end = end_to_end(results, &stop);
        joined(unit_tests, "runs the unit tests")?;
        end
    })
}

/// Waits for a thread of [`run`], which `what` describes. Returns the thread's result.
fn joined(thread: ScopedJoinHandle<'_, Result<()>>, what: &str) -> Result<()> {
    thread.join().unwrap_or_else(|_| bail!("the thread that {what} panicked"))
}

/// Makes what cargo does not build: the guest kernel and the files of the test node.
fn parts() -> Result<()> {
    kernel::kernel()?;
    node::prepare()?;
    node::prepare_images()
}

/// The work that nodes running side by side share. Each node takes its boots from `plans`.
struct Work {
    plans: Vec<(Line, Plan)>,
    results: Results,
    boots: usize,
}

/// The suites of one boot.
struct Boot {
    number: usize,
    line: Line,
    /// The suites, each with the number of its attempt.
    suites: Vec<(String, usize)>,
}

impl Work {
    fn next(&mut self) -> Option<Boot> {
        let (line, names) = plan::next(&mut self.plans)?;
        self.boots += 1;
        let numbered = |name: String| {
            let attempt = self.results.next_attempt(&line.name(), &name);
            (name, attempt)
        };
        Some(Boot { number: self.boots, line, suites: names.into_iter().map(numbered).collect() })
    }
}

/// Runs the end-to-end suites in nodes side by side.
/// Once `stop` is true, no further node is booted.
fn e2e(filter: Filter<'_>, options: &Options, stages: &Stages, results: Results, stop: &AtomicBool) -> Result<End> {
    let declared = suites::read()?;
    let names: Vec<&str> = declared.iter().map(|suite| suite.name.as_str()).collect();
    filter.check_suites(&names)?;
    let suites = stages.measure("build of programs and suites", || {
        dist::dist(Profile::quick(!options.release))?;
        build::tests("husk-e2e")
    })?;
    if suites.is_empty() {
        bail!("failed to find a test program of husk-e2e");
    }
    let extent = match options {
        Options { containerd: Some(_), .. } => Extent::Line,
        Options { all: true, .. } => Extent::All,
        _ => Extent::Change,
    };
    let filtered = filter != Filter::All;
    let long = filtered || extent > Extent::Change;
    let mut named = Vec::new();
    for suite in &suites {
        let source = declared.iter().find(|declared| declared.name == suite.name);
        let source =
            source.with_context(|| format!("failed to find the source of suite {} in tests/e2e", suite.name))?;
        if !filter.selected(suite, long)?.is_empty() {
            named.push((suite, &source.needs));
        }
    }
    if named.is_empty() {
        return filter.fail_without_match(&names);
    }
    // Suites are retried because QEMU's emulator has flaws. node/boot.rs avoids the worst flaw. Another flaw is in
    // helper_vmrun() of target/i386/tcg/system/svm_helper.c: in exception_index, QEMU keeps the vector of an interrupt
    // that VMRUN injects. If the CPU is kicked before the next #VMEXIT, QEMU delivers the interrupt a second time.
    let emulated = !matches!(kvm::judge(), kvm::Verdict::Usable { .. });
    let retries = match (emulated, options.no_retry) {
        (false, _) => Retries::Never,
        (true, true) => Retries::Resume,
        (true, false) => Retries::Retry,
    };
    let mut work = Work { plans: Vec::new(), results, boots: 0 };
    for line in options.containerd.map_or_else(|| LINES.to_vec(), |line| vec![line]) {
        let chosen = named.iter().filter(|(_, needs)| runs(needs, line, extent, filtered));
        let names: Vec<String> = chosen.map(|(suite, _)| suite.name.clone()).collect();
        for name in &names {
            work.results.plan(&line.name(), name);
        }
        let batch = match side::seats() {
            _ if filtered => names.len(),
            1 => SUITES_A_BOOT,
            _ => SUITES_A_BOOT_BESIDE,
        };
        work.plans.push((line, Plan::new(names, batch, retries)));
    }
    let summary = |finished| Summary {
        e2e: Some(E2eSummary {
            filter: options.e2e.clone().unwrap_or_default(),
            retry: retries == Retries::Retry,
            emulated,
        }),
        finished,
        seconds: stages.elapsed(),
        stages: stages.list(),
    };
    let work = side::side_by_side(
        work,
        |work| if stop.load(Ordering::Relaxed) { None } else { work.next() },
        |seat, boot| {
            let program = |(name, _): &(String, usize)| named.iter().map(|(suite, _)| *suite).find(|s| s.name == *name);
            let programs: Vec<&Program> = boot.suites.iter().filter_map(program).collect();
            let selection = Selection { filter, long, syscalls: options.syscalls, templates: options.templates };
            run_boot(seat, boot, &programs, &selection, options.handler.as_deref())
        },
        |work, boot, report: BootReport| {
            let name = boot.line.name();
            let stage = format!("boot {} with containerd {name}", boot.number);
            stages.add(stage, report.begin, report.begin.elapsed(), report.parts);
            let outcome = |(suite, _): &(String, usize)| {
                let attempt = report.attempts.iter().find(|(name, _)| name == suite);
                let outcome = attempt.map_or(Outcome::Waiting, |(_, attempt)| match attempt.outcome {
                    AttemptOutcome::Passed => Outcome::Passed,
                    AttemptOutcome::Failed => Outcome::Failed,
                    AttemptOutcome::Crashed => Outcome::Begun,
                });
                (suite.clone(), outcome)
            };
            let outcomes = boot.suites.iter().map(outcome).collect();
            if let Some((_, plan)) = work.plans.iter_mut().find(|(line, _)| *line == boot.line) {
                plan.ended(outcomes);
            }
            work.results.add(&name, report.attempts);
            if let Err(error) = work.results.write(&summary(false)) {
                ui::say("test", format!("{error:#}"));
            }
        },
    )?;
    work.results.write(&summary(true))?;
    ui::say("test", "the slowest tests, in seconds:");
    eprint!("{}", work.results.slowest(SLOWEST));
    let mut notes = Vec::new();
    for (what, outcome) in [
        ("UNSTEADY, passed only at the second attempt", SuiteOutcome::Flaky),
        ("failed", SuiteOutcome::Failed),
        ("not run", SuiteOutcome::NotRun),
    ] {
        notes.extend(work.results.with_logs(outcome).into_iter().map(|suite| format!("{what}: {suite}")));
    }
    let mut failed = work.plans.iter().any(|(_, plan)| !plan.failed().is_empty());
    if options.syscalls {
        ui::say("test", format!("did not run the tests with `{}` in their names", syscalls::NEEDS_FILTERS));
        failed |= !syscalls::report()?;
    }
    Ok(End { code: u8::from(failed), notes })
}

/// Selects which tests of a suite run.
struct Selection<'a> {
    filter: Filter<'a>,
    /// Whether long tests run.
    long: bool,
    /// Whether the system calls of the VMMs are recorded.
    syscalls: bool,
    /// Whether guests are made from a template.
    templates: bool,
}

impl Selection<'_> {
    /// Returns the arguments for libtest.
    fn args(&self) -> Vec<String> {
        let mut args = Vec::new();
        args.extend(self.long.then(|| "--include-ignored".to_owned()));
        if self.syscalls {
            args.extend(["--skip".to_owned(), syscalls::NEEDS_FILTERS.to_owned()]);
        }
        args.extend(self.filter.part_of_name().map(str::to_owned));
        args
    }
}

/// Runs the suites of a boot in a node.
fn run_boot(
    seat: Seat,
    boot: &Boot,
    suites: &[&Program],
    selection: &Selection<'_>,
    handler: Option<&str>,
) -> Result<BootReport> {
    let mut recorder = Recorder::new(paths::results(), &boot.line.name(), &boot.suites)?;
    let mut add = node::images()?;
    for Program { name, path } in suites {
        if name == BUILDERS {
            add.extend(node::builder_images()?);
        }
        if name == FSX {
            add.extend(node::fsx_image()?);
        }
        if name == HOSTILE {
            add.extend(hostile_guests(seat)?);
        }
        if name == SAVED {
            add.push(Add::new(build::test("husk-vmm", "saved")?.path, "/husk/saved"));
        }
        add.push(Add::new(path, format!("/husk/tests/{name}")));
    }
    files::make_dir(&seat.dir())?;
    let path = seat.dir().join("e2e.sh");
    fs::write(&path, script(boot, selection)).with_context(|| format!("failed to write {}", path.display()))?;
    let mut env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned()), ("RUST_BACKTRACE".into(), "1".into())];
    env.extend(handler.map(|handler| ("HUSK_E2E_HANDLER".to_owned(), handler.to_owned())));
    let limits = if selection.filter == Filter::All { LIMITS } else { Limits::default() };
    let (args, machine, containerd) = (selection.args(), Machine::default(), boot.line);
    let run = Run { script: path, args, env, add, imported: true, machine, containerd, limits, seat };
    let console = match node::run_observed(&run, &mut |progress| recorder.note(progress)) {
        Err(error) if error.is::<Crashed>() => {
            ui::say("test", format!("{error:#}"));
            Some(seat.console()?)
        }
        end => {
            end?;
            None
        }
    };
    if selection.syscalls && console.is_none() {
        syscalls::keep(&seat.out_dir(), boot.number)?;
    }
    recorder.finish(console.as_deref(), boot.number)
}

/// Builds the hostile guests: the program that attacks the VMM's devices, and an initramfs with a lying agent.
fn hostile_guests(seat: Seat) -> Result<[Add; 2]> {
    let attacker = build::test("husk-vmm", "hostile")?;
    let programs = build::programs(&["husk-e2e"], Profile::Node)?;
    files::make_dir(&seat.dir())?;
    let initrd = seat.dir().join("lying-agent.cpio");
    image::pack_other(build::find(&programs, &["husk-lying-agent"])?, &initrd)?;
    Ok([Add::new(attacker.path, "/husk/hostile"), Add::new(initrd, "/husk/lying-agent.cpio")])
}

/// Returns the script that runs the suites of a boot. [`Recorder`] reads the script's marks, and the line that the
/// script prints before each suite's output.
fn script(boot: &Boot, selection: &Selection<'_>) -> String {
    let mut script = String::from("# Runs the suites one after another. Fails if a suite fails.\nfailed=0\n");
    if selection.syscalls {
        script.push_str(&syscalls::begin());
    }
    if selection.templates {
        script.push_str(MAKE_TEMPLATE);
    }
    for (name, _) in &boot.suites {
        script.push_str(&format!(
            "echo \"== {name}\"; echo \"mark begun {name}\" >&9\n\
             if /husk/tests/{name} --test-threads=1 \"$@\" 9>&-; then echo \"mark passed {name}\" >&9\n\
             else failed=1; echo \"mark failed {name}\" >&9; fi\n"
        ));
    }
    if selection.syscalls {
        script.push_str(syscalls::END);
    }
    if selection.templates {
        script.push_str(COUNT_CLONES);
    }
    script.push_str("exit $failed\n");
    script
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::libtest::TestOutcome;
    use crate::node::Progress;
    use crate::results::Attempt;

    /// Runs the script of a boot on this machine, with other programs in place of the suites.
    fn boot_here(dir: &Path, results: &mut Results, boot: &Boot, args: &[&str]) -> Vec<(String, Attempt)> {
        let selection = Selection { filter: Filter::All, long: false, syscalls: false, templates: false };
        let script = script(boot, &selection).replace("/husk/tests", &dir.join("suites").display().to_string());
        let marks = dir.join("marks");
        let mut bash = Command::new("bash");
        bash.arg("-c").arg(format!("exec 9>'{}'; {script}", marks.display())).arg("script").args(args);
        let output = bash.output().unwrap().stdout;
        let mut recorder = Recorder::new(dir.join("results"), &boot.line.name(), &boot.suites).unwrap();
        for line in fs::read_to_string(marks).unwrap().lines() {
            recorder.note(Progress::Mark(line.strip_prefix("mark ").unwrap()));
        }
        output.chunks(7).for_each(|bytes| recorder.note(Progress::Output(bytes)));
        let attempts = recorder.finish(None, boot.number).unwrap().attempts;
        results.add(&boot.line.name(), attempts.clone());
        attempts
    }

    #[test]
    fn a_suite_that_passes_at_the_second_attempt_is_flaky() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let suite = |name: &str, text: &str| {
            let path = dir.join("suites").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let own = std::env::current_exe().unwrap();
        let libtest = format!("exec '{}' \"$@\"", own.display());
        suite("good", &libtest);
        suite("unsteady", "echo; echo 'running 1 test'; printf 'test a ... '; kill -9 $$");
        let mut results = Results::new(dir.join("results")).unwrap();
        for name in ["good", "unsteady"] {
            results.plan("2", name);
        }
        let suites = vec![("good".to_owned(), 1), ("unsteady".to_owned(), 1)];
        let boot = Boot { number: 1, line: Line::Two, suites };
        let attempts = boot_here(dir, &mut results, &boot, &["deny::expression::tests::"]);
        let outcomes: Vec<_> = attempts.iter().map(|(name, attempt)| (name.as_str(), attempt.outcome)).collect();
        assert_eq!(outcomes, [("good", AttemptOutcome::Passed), ("unsteady", AttemptOutcome::Failed)]);
        assert_eq!(attempts[1].1.tests[0].outcome, TestOutcome::Unfinished);
        assert!(results.with_logs(SuiteOutcome::Failed)[0].contains("logs/2/unsteady.1.log"));
        suite("unsteady", &libtest);
        let boot = Boot { number: 2, line: Line::Two, suites: vec![("unsteady".to_owned(), 2)] };
        let attempts = boot_here(dir, &mut results, &boot, &["deny::expression::tests::"]);
        assert!(!attempts[0].1.tests.is_empty());
        assert!(attempts[0].1.tests.iter().all(|test| test.outcome == TestOutcome::Passed));
        assert!(results.with_logs(SuiteOutcome::Failed).is_empty());
        let flaky = results.with_logs(SuiteOutcome::Flaky);
        assert!(flaky.len() == 1 && flaky[0].contains("logs/2/unsteady.1.log"), "{flaky:?}");
        assert!(fs::read_to_string(dir.join("results/logs/2/unsteady.1.log")).unwrap().contains("test a"));
    }

    #[test]
    fn arguments_include_ignored_tests_only_if_long_tests_run() {
        let args =
            |filter, long| Selection { filter: Filter::parse(filter), long, syscalls: false, templates: false }.args();
        assert!(args("", false).is_empty());
        assert_eq!(args("", true), ["--include-ignored"]);
        assert_eq!(args("name", true), ["--include-ignored", "name"]);
        assert_eq!(args("@suite", true), ["--include-ignored"]);
    }
}
