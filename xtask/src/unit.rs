//! The stages of `cargo xtask test` before the end-to-end suites: checks, lints and unit tests. After each
//! stage, the results so far are written to files.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::build::cargo;
use crate::cargo_test::{self, Binary};
use crate::libtest::{TestOutcome, TestRun};
use crate::results::{Results, Summary, UNIT};
use crate::stages::{self, Part, Stages};
use crate::{cmd, deny, imports, modules, paths, suites, ui};

/// The name of a check, and the function that runs the check. The function returns an error if the check fails.
type Check = (&'static str, fn() -> Result<()>);

/// The checks that need no compiler.
const FORMAT: [Check; 5] = [
    ("dependencies", deny::deny),
    ("format", || cmd::shown(cargo().args(["fmt", "--all", "--check"]))),
    ("imports", || imports::imports(false)),
    ("requirements of the suites", || suites::read().map(drop)),
    ("modules", modules::check),
];

/// The lints.
const LINTS: [Check; 1] = [("clippy", || {
    let mut clippy = cargo();
    clippy.args(["clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]);
    cmd::shown(&mut clippy)
})];

/// The stages of a run, with their results.
pub struct Unit<'a> {
    stages: &'a Stages,
    results: Results,
}

impl<'a> Unit<'a> {
    /// Removes the results of an earlier run.
    pub fn new(stages: &'a Stages) -> Result<Self> {
        Ok(Unit { stages, results: Results::new_unit(paths::results())? })
    }

    /// Runs the checks that need no compiler.
    pub fn format(&mut self) -> Result<()> {
        ui::say("test", "checking dependencies, format, imports, requirements of the suites, and modules");
        self.checks("format and structure", "format", &FORMAT)
    }

    /// Runs the lints.
    pub fn lints(&mut self) -> Result<()> {
        ui::say("test", "lints");
        self.checks("lints", "lints", &LINTS)
    }

    /// Runs the unit tests.
    pub fn unit_tests(&mut self) -> Result<()> {
        ui::say("test", "unit tests");
        let mut tests = cargo();
        // husk-e2e has the end-to-end suites, which can run only in the node.
        tests.args(["test", "--no-fail-fast", "--workspace", "--exclude", "husk-e2e", "--locked"]);
        // libtest reports the start of a test only if libtest runs one test at a time.
        tests.env("RUST_TEST_THREADS", "1");
        self.tests("unit tests", UNIT, || cargo_test::run("test", &mut tests))?;
        self.write(true)
    }

    /// Runs the checks of a stage, until a check fails. `suite` is the name of the stage in the results.
    fn checks(&mut self, stage: &str, suite: &str, checks: &[Check]) -> Result<()> {
        let begin = Instant::now();
        let (mut tests, mut parts, mut end) = (Vec::new(), Vec::new(), Ok(()));
        for (name, check) in checks {
            let begin = Instant::now();
            end = check();
            let outcome = if end.is_ok() { TestOutcome::Passed } else { TestOutcome::Failed };
            let mut test = TestRun::new(name, outcome, begin.elapsed());
            test.failure = end.as_ref().err().map(|error| format!("{error:#}"));
            parts.push(Part { name: (*name).to_owned(), seconds: stages::seconds(test.duration) });
            tests.push(test);
            if end.is_err() {
                break;
            }
        }
        let parts = if checks.len() > 1 { parts } else { Vec::new() };
        self.stages.add(stage.to_owned(), begin, begin.elapsed(), parts);
        self.results.add_checks(suite, tests)?;
        self.write(false)?;
        end
    }

    /// Runs the test binaries of a stage. `line` names the stage in the results.
    fn tests(&mut self, stage: &str, line: &str, run: impl FnOnce() -> Result<Vec<Binary>>) -> Result<()> {
        let binaries = match self.stages.measure(stage, run) {
            Ok(binaries) => binaries,
            Err(error) => {
                let mut build = TestRun::new(stage, TestOutcome::Failed, Duration::ZERO);
                build.failure = Some(format!("{error:#}"));
                self.results.add_checks("build", vec![build])?;
                self.write(false)?;
                return Err(error);
            }
        };
        let failed: Vec<String> =
            binaries.iter().filter(|binary| !binary.passed).map(|binary| binary.name.clone()).collect();
        for binary in binaries {
            self.results.add_binary(line, binary)?;
        }
        self.write(false)?;
        if !failed.is_empty() {
            bail!("{stage} failed: {}", failed.join(", "));
        }
        Ok(())
    }

    fn write(&self, finished: bool) -> Result<()> {
        let (seconds, stages) = (self.stages.elapsed(), self.stages.list());
        self.results.write(&Summary { e2e: None, finished, seconds, stages })
    }
}
