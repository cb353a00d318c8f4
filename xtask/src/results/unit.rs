//! Adds the results of checks and of test binaries.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::outcome::{Attempt, AttemptOutcome, SuiteResult};
use super::{Results, Scope};
use crate::cargo_test::Binary;
use crate::files;
use crate::libtest::{TestOutcome, TestRun};
use crate::stages;

/// Name that the results use instead of a containerd line for suites of checks.
const CHECKS: &str = "checks";
/// Name that the results use instead of a containerd line for test binaries.
pub const UNIT: &str = "unit";

impl Results {
    /// Creates an empty set of results of unit tests, which will be written to `dir`. Removes the results of unit tests
    /// of an earlier run from `dir`.
    pub fn new_unit(dir: PathBuf) -> Result<Self> {
        let name = Scope::Unit.name();
        for file in [format!("{name}.json"), format!("{name}.xml")] {
            files::remove(&dir.join(file))?;
        }
        for line in [CHECKS, UNIT] {
            files::remove(&dir.join("logs").join(line))?;
        }
        files::make_dir(&dir)?;
        Ok(Results { dir, scope: Scope::Unit, suites: Vec::new() })
    }

    /// Adds the results of a test binary, and writes the binary's output to a log.
    pub fn add_binary(&mut self, line: &str, binary: Binary) -> Result<()> {
        let outcome = if binary.passed { AttemptOutcome::Passed } else { AttemptOutcome::Failed };
        let log = self.write_log(line, &binary.name, &binary.output)?;
        let seconds = stages::seconds(binary.duration);
        let attempt = Attempt { attempt: 1, outcome, seconds, log, console: None, tests: binary.tests };
        self.suites.push(SuiteResult { line: line.to_owned(), suite: binary.name, attempts: vec![attempt] });
        Ok(())
    }

    /// Adds the checks of a stage as a suite.
    pub fn add_checks(&mut self, suite: &str, tests: Vec<TestRun>) -> Result<()> {
        let failed = tests.iter().any(|test| test.outcome != TestOutcome::Passed);
        let outcome = if failed { AttemptOutcome::Failed } else { AttemptOutcome::Passed };
        let mut output = String::new();
        for TestRun { name, outcome, failure, .. } in &tests {
            let result = if *outcome == TestOutcome::Passed { "ok" } else { "FAILED" };
            let _ = writeln!(output, "{name} ... {result}");
            if let Some(failure) = failure {
                let _ = writeln!(output, "{failure}");
            }
        }
        let log = self.write_log(CHECKS, suite, &output)?;
        let seconds = stages::seconds(tests.iter().map(|test| test.duration).sum());
        let attempt = Attempt { attempt: 1, outcome, seconds, log, console: None, tests };
        self.suites.push(SuiteResult { line: CHECKS.to_owned(), suite: suite.to_owned(), attempts: vec![attempt] });
        Ok(())
    }

    /// Writes the log of a suite. Returns its path, relative to the results' directory.
    fn write_log(&self, line: &str, suite: &str, output: &str) -> Result<PathBuf> {
        let log = Path::new("logs").join(line).join(format!("{suite}.1.log"));
        let path = self.dir.join(&log);
        files::make_dir(path.parent().unwrap_or(&self.dir))?;
        fs::write(&path, output).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(log)
    }
}
