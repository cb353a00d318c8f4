//! Converts results to JUnit. Each suite becomes a JUnit test suite for each line with which the suite ran.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestRerun, TestSuite};

use super::outcome::{Attempt, AttemptOutcome, SuiteOutcome, SuiteResult};
use crate::libtest::{TestOutcome, TestRun};

/// Returns the report, called `name`, of a run that took this many seconds.
pub fn report(name: &str, suites: &[SuiteResult], seconds: f64) -> Report {
    let mut report = Report::new(name);
    report.set_time(Duration::from_secs_f64(seconds));
    report.add_test_suites(suites.iter().map(junit_suite));
    report
}

/// Returns the JUnit form of a suite, with the tests of all attempts. The test case `(suite)` is added if the suite was
/// not run, if an attempt did not pass although none of its tests failed, or if the suite has no test.
fn junit_suite(result: &SuiteResult) -> TestSuite {
    let class = format!("{}.{}", result.line, result.suite);
    let mut suite = TestSuite::new(&class);
    let seconds = result.attempts.iter().map(|attempt| attempt.seconds).sum();
    suite.set_time(Duration::from_secs_f64(seconds));
    let mut names: Vec<&str> = Vec::new();
    for test in result.attempts.iter().flat_map(|attempt| &attempt.tests) {
        if !names.contains(&test.name.as_str()) {
            names.push(&test.name);
        }
    }
    for name in names {
        let runs = result
            .attempts
            .iter()
            .filter_map(|attempt| attempt.tests.iter().find(|test| test.name == name).map(|test| (attempt, test)));
        suite.add_test_case(junit_case(name, &class, &runs.collect::<Vec<_>>()));
    }
    let unexplained = |attempt: &&Attempt| {
        let explains = |test: &TestRun| matches!(test.outcome, TestOutcome::Failed | TestOutcome::Unfinished);
        attempt.outcome != AttemptOutcome::Passed && !attempt.tests.iter().any(explains)
    };
    let reruns: Vec<TestRerun> = result
        .attempts
        .iter()
        .filter(unexplained)
        .map(|attempt| {
            let mut rerun = TestRerun::new(NonSuccessKind::Error);
            rerun.set_message(attempt_message(attempt));
            rerun
        })
        .collect();
    let status = match (result.outcome(), reruns.is_empty()) {
        (SuiteOutcome::NotRun, _) => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message("the suite was not run: the node ended before the suite began");
            Some(status)
        }
        (_, true) if suite.test_cases.is_empty() => Some(TestCaseStatus::success()),
        (_, true) => None,
        (SuiteOutcome::Failed, false) => Some(TestCaseStatus::non_success(NonSuccessKind::Error)),
        (_, false) => Some(TestCaseStatus::success()),
    };
    if let Some(mut status) = status {
        status.add_reruns(reruns);
        let mut case = TestCase::new("(suite)", status);
        case.set_classname(&class);
        suite.add_test_case(case);
    }
    suite
}

fn attempt_message(attempt: &Attempt) -> String {
    let what = match attempt.outcome {
        AttemptOutcome::Passed => "passed",
        AttemptOutcome::Failed => "failed",
        AttemptOutcome::Crashed => "did not end: the node ended first",
    };
    let console = attempt.console.as_ref().map(|path| format!(", {}", path.display())).unwrap_or_default();
    format!("attempt {} {what} ({}{console})", attempt.attempt, attempt.log.display())
}

/// Returns the JUnit form of a test. The last run decides whether the test case passed. Runs that did not pass become
/// reruns.
fn junit_case(name: &str, class: &str, runs: &[(&Attempt, &TestRun)]) -> TestCase {
    let kind = |test: &TestRun| match test.outcome {
        TestOutcome::Failed => Some(NonSuccessKind::Failure),
        TestOutcome::Unfinished => Some(NonSuccessKind::Error),
        TestOutcome::Passed | TestOutcome::Ignored => None,
    };
    let last = runs.last().map(|(_, test)| *test);
    let mut status = match last.map(|test| (test.outcome, kind(test))) {
        Some((TestOutcome::Ignored, _)) => TestCaseStatus::skipped(),
        Some((_, Some(kind))) => TestCaseStatus::non_success(kind),
        _ => TestCaseStatus::success(),
    };
    let mut bad = runs.iter().filter_map(|(attempt, test)| kind(test).map(|kind| (*attempt, *test, kind)));
    // If the last run did not pass, the test case gets the text of the first failure. The other failures are reruns.
    if matches!(status, TestCaseStatus::NonSuccess { .. })
        && let Some((attempt, test, _)) = bad.next()
    {
        status.set_message(attempt_message(attempt));
        status.set_description(test.failure.as_deref().unwrap_or_default());
    }
    status.add_reruns(bad.map(|(attempt, test, kind)| {
        let mut rerun = TestRerun::new(kind);
        rerun.set_message(attempt_message(attempt)).set_time(test.duration);
        rerun.set_description(test.failure.as_deref().unwrap_or_default());
        rerun
    }));
    if let Some(reason) = last.and_then(|test| test.ignored.as_deref()) {
        status.set_message(reason);
    }
    let mut case = TestCase::new(name, status);
    case.set_classname(class).set_time(last.map(|test| test.duration).unwrap_or_default());
    case
}
