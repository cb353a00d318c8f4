//! Keeps the results of the checks, the unit tests and the end-to-end suites as JSON and as JUnit, and the output of
//! each attempt as a log file.
//!
//! Everything is in `target/husk/results`. `unit.json` and `unit.xml` are rewritten after each stage. `e2e.json` and
//! `e2e.xml` are rewritten after each boot of a node. Therefore, if a run is stopped, the files have the results of the
//! stages and boots that have ended.

mod junit;
mod outcome;
mod recorder;
mod unit;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::files;
use crate::libtest::TestOutcome;
use crate::stages::{self, Stage};
use outcome::SuiteResult;

pub use outcome::{Attempt, AttemptOutcome, SuiteOutcome};
pub use recorder::{BootReport, Recorder};
pub use unit::UNIT;

/// The tests that a set of results covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// The checks and the unit tests.
    Unit,
    /// The end-to-end suites.
    #[default]
    E2e,
}

impl Scope {
    /// Returns the name of the files of the results, without the extension.
    fn name(self) -> &'static str {
        match self {
            Scope::Unit => "unit",
            Scope::E2e => "e2e",
        }
    }
}

/// The results of a run.
#[derive(Default)]
pub struct Results {
    dir: PathBuf,
    scope: Scope,
    suites: Vec<SuiteResult>,
}

/// The facts in `unit.json` and `e2e.json` that concern the run as a whole.
#[derive(Serialize)]
pub struct Summary {
    /// Facts about a run of end-to-end suites. `None` for unit tests.
    #[serde(flatten)]
    pub e2e: Option<E2eSummary>,
    /// Whether all stages or all boots of the run have ended.
    pub finished: bool,
    pub seconds: f64,
    pub stages: Vec<Stage>,
}

/// The facts in `e2e.json` that concern the run as a whole, and that `unit.json` does not have.
#[derive(Serialize)]
pub struct E2eSummary {
    /// The filter on test names. Empty if the run had no filter.
    pub filter: String,
    /// Whether suites that failed were retried.
    pub retry: bool,
    /// Whether the nodes were emulated.
    pub emulated: bool,
}

#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    suites: Vec<JsonSuite<'a>>,
    tests: Vec<JsonTest<'a>>,
}

#[derive(Serialize)]
struct JsonSuite<'a> {
    suite: &'a str,
    line: &'a str,
    outcome: SuiteOutcome,
    attempts: &'a [Attempt],
}

#[derive(Serialize)]
struct JsonTest<'a> {
    name: &'a str,
    suite: &'a str,
    line: &'a str,
    attempt: usize,
    outcome: TestOutcome,
    seconds: f64,
    log: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ignored: Option<&'a str>,
}

impl Results {
    /// Creates an empty set of results of end-to-end suites, which will be written to `dir`. Removes all results of an
    /// earlier run from `dir`.
    pub fn new(dir: PathBuf) -> Result<Self> {
        files::remove(&dir)?;
        files::make_dir(&dir)?;
        Ok(Results { dir, scope: Scope::E2e, suites: Vec::new() })
    }

    /// Adds a suite that is to run with a containerd line.
    pub fn plan(&mut self, line: &str, suite: &str) {
        self.suites.push(SuiteResult { line: line.to_owned(), suite: suite.to_owned(), attempts: Vec::new() });
    }

    /// Returns the number of the next attempt of a suite.
    pub fn next_attempt(&self, line: &str, suite: &str) -> usize {
        self.find(line, suite).map_or(0, |result| result.attempts.len()) + 1
    }

    /// Adds attempts of suites with a containerd line.
    pub fn add(&mut self, line: &str, attempts: Vec<(String, Attempt)>) {
        for (suite, attempt) in attempts {
            if let Some(result) = self.suites.iter_mut().find(|result| result.line == line && result.suite == suite) {
                result.attempts.push(attempt);
            }
        }
    }

    fn find(&self, line: &str, suite: &str) -> Option<&SuiteResult> {
        self.suites.iter().find(|result| result.line == line && result.suite == suite)
    }

    /// Returns a line for each suite with this outcome. The line names the logs of the attempts that did not pass.
    pub fn with_logs(&self, outcome: SuiteOutcome) -> Vec<String> {
        let suites = self.suites.iter().filter(|result| result.outcome() == outcome);
        suites
            .map(|result| {
                let bad = result.attempts.iter().filter(|attempt| attempt.outcome != AttemptOutcome::Passed);
                let logs: Vec<_> = bad.map(|attempt| self.dir.join(&attempt.log).display().to_string()).collect();
                let logs = if logs.is_empty() { "no log".to_owned() } else { logs.join(", ") };
                format!("{} with containerd {} ({logs})", result.suite, result.line)
            })
            .collect()
    }

    /// Returns a line for each of the `count` slowest tests, with its duration in seconds, and a line with the total
    /// duration of all tests.
    pub fn slowest(&self, count: usize) -> String {
        let of_result = |result: &SuiteResult| {
            let tests = result.attempts.iter().flat_map(|attempt| &attempt.tests);
            tests.map(|test| (test.duration, format!("{} {} ({})", result.suite, test.name, result.line))).collect()
        };
        let mut tests: Vec<(Duration, String)> = self.suites.iter().flat_map::<Vec<_>, _>(of_result).collect();
        tests.sort_by(|a, b| b.cmp(a));
        let line = |duration: Duration, name: &str| format!("{:9.1}  {name}\n", duration.as_secs_f64());
        let mut text: String = tests.iter().take(count).map(|(duration, name)| line(*duration, name)).collect();
        let sum = tests.iter().map(|(duration, _)| duration).sum();
        text.push_str(&line(sum, &format!("all {} tests", tests.len())));
        text
    }

    /// Writes the JSON file and the JUnit file.
    pub fn write(&self, summary: &Summary) -> Result<()> {
        let json = serde_json::to_vec_pretty(&self.json(summary)).context("failed to serialize the results as JSON")?;
        let name = self.scope.name();
        let xml = junit::report(&format!("husk-{name}"), &self.suites, summary.seconds)
            .to_string()
            .context("failed to serialize the results as JUnit")?;
        for (name, content) in [(format!("{name}.json"), json), (format!("{name}.xml"), xml.into_bytes())] {
            let (path, part) = (self.dir.join(&name), self.dir.join(format!("{name}.part")));
            fs::write(&part, content).with_context(|| format!("failed to write {}", part.display()))?;
            fs::rename(&part, &path).with_context(|| format!("failed to rename {}", part.display()))?;
        }
        Ok(())
    }

    fn json<'a>(&'a self, summary: &'a Summary) -> Json<'a> {
        let suite = |result: &'a SuiteResult| JsonSuite {
            suite: &result.suite,
            line: &result.line,
            outcome: result.outcome(),
            attempts: &result.attempts,
        };
        let mut tests = Vec::new();
        for result in &self.suites {
            for attempt in &result.attempts {
                tests.extend(attempt.tests.iter().map(|test| JsonTest {
                    name: &test.name,
                    suite: &result.suite,
                    line: &result.line,
                    attempt: attempt.attempt,
                    outcome: test.outcome,
                    seconds: stages::seconds(test.duration),
                    log: &attempt.log,
                    failure: test.failure.as_deref(),
                    ignored: test.ignored.as_deref(),
                }));
            }
        }
        Json { summary, suites: self.suites.iter().map(suite).collect(), tests }
    }
}

#[cfg(test)]
mod tests;
