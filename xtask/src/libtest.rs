//! Parses the output of libtest with `--test-threads=1`: which tests ran, their results, and how long they took.
//!
//! libtest's JSON output is unstable, so this module parses the text. The list of failures at the end of the text
//! decides which tests failed. The result after "test NAME ... " is less reliable, because a program that the test
//! starts can print before the result.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Maximum size of a failure's text in bytes. From a longer text, the parser keeps only the end, because the end says
/// why the test failed.
const FAILURE_TEXT: usize = 8192;

/// The result of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TestOutcome {
    Passed,
    Failed,
    /// The test has `#[ignore]`, and the run left out such tests.
    Ignored,
    /// The output ended while the test ran.
    Unfinished,
}

/// A test that ran or was ignored.
#[derive(Clone, Debug, PartialEq)]
pub struct TestRun {
    pub name: String,
    pub outcome: TestOutcome,
    pub duration: Duration,
    /// What a failed test printed. `None` if libtest showed no output of the test.
    pub failure: Option<String>,
    /// The reason in the test's `#[ignore]`, if the test was ignored and its `#[ignore]` has a reason.
    pub ignored: Option<String>,
}

impl TestRun {
    /// Creates the result of a test that printed nothing.
    pub fn new(name: &str, outcome: TestOutcome, duration: Duration) -> Self {
        TestRun { name: name.to_owned(), outcome, duration, failure: None, ignored: None }
    }
}

/// The part of the output that the next line belongs to.
#[derive(Clone, Copy, PartialEq)]
enum Section {
    Tests,
    /// The output of failed tests. The value is the index of the test whose output the line belongs to. `None` if the
    /// line belongs to no test's output.
    Failures(Option<usize>),
}

/// Parses the output of one test binary.
pub struct Parser {
    tests: Vec<TestRun>,
    section: Section,
    /// The running test, and the time at which it began.
    running: Option<(String, Instant)>,
    /// The time at which the last complete line was read.
    last: Instant,
}

impl Parser {
    /// Creates a parser for output that begins at `now`.
    pub fn new(now: Instant) -> Self {
        Parser { tests: Vec::new(), section: Section::Tests, running: None, last: now }
    }

    /// Reads the part of the current line that has been printed so far. libtest prints a test's name when the test
    /// begins, and completes the line when the test ends.
    pub fn partial(&mut self, text: &str, now: Instant) {
        if let Some((name, "")) = test_line(text)
            && self.section == Section::Tests
            && self.running.as_ref().is_none_or(|(running, _)| running != name)
        {
            self.end(TestOutcome::Passed, now);
            self.running = Some((name.to_owned(), now));
        }
    }

    /// Reads a complete line, without the newline.
    pub fn line(&mut self, line: &str, now: Instant) {
        match self.section {
            Section::Tests => self.test(line, now),
            Section::Failures(open) => self.failure(line, open),
        }
        self.last = now;
    }

    fn test(&mut self, line: &str, now: Instant) {
        if let Some((name, rest)) = test_line(line) {
            // If the previous test's result was not seen, that test counts as passed, until the list of failures names
            // it.
            if self.running.as_ref().is_none_or(|(running, _)| running != name) {
                self.end(TestOutcome::Passed, self.last);
                self.running = Some((name.to_owned(), self.last));
            }
            if let Some(outcome) = outcome(rest) {
                self.end(outcome, now);
                if let Some((test, reason)) = self.tests.last_mut().zip(rest.strip_prefix("ignored, ")) {
                    test.ignored = Some(reason.to_owned());
                }
            }
        } else if line == "failures:" {
            self.end(TestOutcome::Passed, self.last);
            self.section = Section::Failures(None);
        } else if line.starts_with("test result: ") {
            self.end(TestOutcome::Passed, self.last);
        } else if let Some(outcome) = outcome(line) {
            self.end(outcome, now);
        }
    }

    fn failure(&mut self, line: &str, open: Option<usize>) {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            let index = self.tests.iter().position(|test| test.name == plain(name));
            if let Some(test) = index.and_then(|index| self.tests.get_mut(index)) {
                test.outcome = TestOutcome::Failed;
                test.failure = Some(String::new());
            }
            self.section = Section::Failures(index);
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.section = Section::Failures(None);
        } else if let Some(text) = open.and_then(|index| self.tests.get_mut(index)?.failure.as_mut()) {
            text.push_str(line);
            text.push('\n');
        } else if let Some(name) = line.strip_prefix("    ")
            && let Some(test) = self.tests.iter_mut().find(|test| test.name == name)
        {
            test.outcome = TestOutcome::Failed;
        }
    }

    /// Ends the running test, if there is one.
    fn end(&mut self, outcome: TestOutcome, now: Instant) {
        if let Some((name, since)) = self.running.take() {
            self.tests.push(TestRun::new(&name, outcome, now.saturating_duration_since(since)));
        }
    }

    /// Ends the output at `now`, and returns the tests.
    pub fn finish(mut self, now: Instant) -> Vec<TestRun> {
        self.end(TestOutcome::Unfinished, now);
        for test in &mut self.tests {
            if let Some(text) = &mut test.failure {
                let from = (text.len().saturating_sub(FAILURE_TEXT)..).find(|at| text.is_char_boundary(*at));
                *text = text.get(from.unwrap_or_default()..).unwrap_or_default().trim().to_owned();
            }
        }
        self.tests
    }
}

/// Returns NAME and REST of a line "test NAME ... REST".
fn test_line(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ...")?;
    let name = plain(name);
    (!name.is_empty() && !name.contains(' ')).then_some((name, rest.trim_start()))
}

/// Returns a test's name without the note that libtest adds to a test that should panic.
fn plain(name: &str) -> &str {
    name.strip_suffix(" - should panic").unwrap_or(name)
}

/// Returns the outcome with which a line ends, if it ends with one. Output of a program may precede the outcome.
fn outcome(text: &str) -> Option<TestOutcome> {
    match text {
        "ignored" => Some(TestOutcome::Ignored),
        text if text.starts_with("ignored, ") => Some(TestOutcome::Ignored),
        text if text.ends_with("ok") => Some(TestOutcome::Passed),
        text if text.ends_with("FAILED") => Some(TestOutcome::Failed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test's name, its outcome, and its duration in seconds.
    type Row = (String, TestOutcome, u64);

    /// Parses lines that arrive one second apart. The part of a line before a "|" arrives one second before the rest of
    /// the line.
    fn parse(text: &str) -> Vec<TestRun> {
        let begin = Instant::now();
        let (mut parser, mut now) = (Parser::new(begin), begin);
        for line in text.lines() {
            now += Duration::from_secs(1);
            if let Some((part, _)) = line.split_once('|') {
                parser.partial(part, now);
                now += Duration::from_secs(1);
            }
            parser.line(&line.replace('|', ""), now);
        }
        parser.finish(now + Duration::from_secs(1))
    }

    /// Parses lines as [`parse`] does. Returns the tests, and the failure text of each test.
    fn read(text: &str) -> (Vec<Row>, Vec<Option<String>>) {
        let tests = parse(text);
        let failures = tests.iter().map(|test| test.failure.clone()).collect();
        let tests = tests.into_iter().map(|test| (test.name, test.outcome, test.duration.as_secs()));
        (tests.collect(), failures)
    }

    fn row(name: &str, outcome: TestOutcome, seconds: u64) -> Row {
        (name.to_owned(), outcome, seconds)
    }

    #[test]
    fn each_test_has_an_outcome_and_a_duration() {
        let (tests, failures) = read(
            "\nrunning 4 tests\ntest a ... |ok\ntest m::b ... |FAILED\ntest c ... ignored, long: a minute\n\
             test d - should panic ... ok\n\nfailures:\n\n---- m::b stdout ----\n\nthread 'm::b' panicked at x:1:\n\
             why\nfailures:\n    m::b\n\ntest result: FAILED. 2 passed; 1 failed; 1 ignored;\n",
        );
        let expected = [
            row("a", TestOutcome::Passed, 1),
            row("m::b", TestOutcome::Failed, 1),
            row("c", TestOutcome::Ignored, 1),
            row("d", TestOutcome::Passed, 1),
        ];
        assert_eq!(tests, expected);
        assert_eq!(failures[1].as_deref(), Some("thread 'm::b' panicked at x:1:\nwhy"));
        assert!(failures[0].is_none());
    }

    #[test]
    fn ignored_test_has_the_reason_of_its_attribute() {
        let tests = parse("test a ... ignored, long: a minute\ntest b ... ignored\ntest c ... ok\n");
        let reasons: Vec<_> = tests.iter().map(|test| test.ignored.as_deref()).collect();
        assert_eq!(reasons, [Some("long: a minute"), None, None]);
    }

    #[test]
    fn output_of_programs_does_not_change_outcomes() {
        let (tests, _) = read(
            "test a ... |a program's words\nok\ntest b ... |noise\nmore noise\ntest c ... |noiseok\n\n\
             failures:\n\nfailures:\n    b\n\ntest result: FAILED. 2 passed; 1 failed\n",
        );
        let expected =
            [row("a", TestOutcome::Passed, 2), row("b", TestOutcome::Failed, 3), row("c", TestOutcome::Passed, 1)];
        assert_eq!(tests, expected);
    }

    #[test]
    fn test_that_did_not_end_is_unfinished() {
        let begin = Instant::now();
        let mut parser = Parser::new(begin);
        parser.line("test a ... ok", begin);
        parser.partial("test b ... ", begin);
        let tests = parser.finish(begin + Duration::from_secs(7));
        assert_eq!(tests[1].outcome, TestOutcome::Unfinished);
        assert_eq!(tests[1].duration, Duration::from_secs(7));
    }

    #[test]
    fn the_output_of_this_compilers_libtest_is_read() {
        let mut own = std::process::Command::new(std::env::current_exe().unwrap());
        let text = crate::cmd::output(own.args(["--test-threads=1", "deny::expression::tests::"])).unwrap();
        let (tests, _) = read(&text);
        assert!(!tests.is_empty(), "{text}");
        assert!(tests.iter().all(|(name, outcome, _)| name.contains("::tests::") && *outcome == TestOutcome::Passed));
    }
}
