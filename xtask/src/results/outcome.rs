//! The outcome of a suite and of each of its attempts.

use std::path::PathBuf;

use serde::Serialize;

use crate::libtest::TestRun;

/// The result of a suite, over all its attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SuiteOutcome {
    Passed,
    /// The first attempt did not pass, and a later attempt did.
    Flaky,
    Failed,
    /// No attempt began.
    NotRun,
}

/// The result of one attempt of a suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptOutcome {
    Passed,
    Failed,
    /// The node ended before the suite did.
    Crashed,
}

/// One attempt of a suite.
#[derive(Clone, Debug, Serialize)]
pub struct Attempt {
    /// The number of the attempt. The first attempt has the number 1.
    pub attempt: usize,
    pub outcome: AttemptOutcome,
    pub seconds: f64,
    /// The path of the suite's output, relative to the results' directory.
    pub log: PathBuf,
    /// The path of the console's log, relative to the results' directory, if the node ended before the suite did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    #[serde(skip)]
    pub tests: Vec<TestRun>,
}

/// The attempts of a suite with one containerd line.
#[derive(Debug)]
pub struct SuiteResult {
    /// The containerd line. For unit tests, the stage in which the suite runs.
    pub line: String,
    pub suite: String,
    pub attempts: Vec<Attempt>,
}

impl SuiteResult {
    pub fn outcome(&self) -> SuiteOutcome {
        match self.attempts.as_slice() {
            [] => SuiteOutcome::NotRun,
            [.., last] if last.outcome != AttemptOutcome::Passed => SuiteOutcome::Failed,
            [_] => SuiteOutcome::Passed,
            _ => SuiteOutcome::Flaky,
        }
    }
}
