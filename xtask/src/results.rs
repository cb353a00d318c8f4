//! Keeps the results of the end-to-end suites: as JSON, as JUnit, and each attempt's output as a log file.
//!
//! Everything is in `target/husk/results`. `e2e.json` and `e2e.xml` are rewritten after each boot of a node, so that a
//! run that is stopped leaves the results up to there.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestRerun, TestSuite};
use serde::Serialize;

use crate::files;
use crate::libtest::{Parser, TestOutcome, TestRun};
use crate::node::Progress;
use crate::stages::{self, Part, Stage};

/// The result of a suite, over all its attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SuiteOutcome {
    Passed,
    /// The first attempt did not pass, and a later one did.
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
    /// Counted from 1.
    pub attempt: usize,
    pub outcome: AttemptOutcome,
    pub seconds: f64,
    /// The suite's output, relative to the results' directory.
    pub log: PathBuf,
    /// The node's console, relative to the results' directory, if the node ended before the suite did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    #[serde(skip)]
    pub tests: Vec<TestRun>,
}

/// A suite with one containerd line.
#[derive(Debug)]
struct SuiteResult {
    line: String,
    suite: String,
    attempts: Vec<Attempt>,
}

impl SuiteResult {
    fn outcome(&self) -> SuiteOutcome {
        match self.attempts.as_slice() {
            [] => SuiteOutcome::NotRun,
            [.., last] if last.outcome != AttemptOutcome::Passed => SuiteOutcome::Failed,
            [_] => SuiteOutcome::Passed,
            _ => SuiteOutcome::Flaky,
        }
    }
}

/// The results of a run.
#[derive(Default)]
pub struct Results {
    dir: PathBuf,
    suites: Vec<SuiteResult>,
}

/// What `e2e.json` has of the run as a whole.
#[derive(Serialize)]
pub struct Summary {
    /// The filter on test names, if there was one.
    pub filter: String,
    /// Whether suites that failed had a second attempt.
    pub retry: bool,
    /// Whether the nodes were emulated.
    pub emulated: bool,
    /// Whether the run came to its end.
    pub finished: bool,
    pub seconds: f64,
    pub stages: Vec<Stage>,
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
}

impl Results {
    /// No results yet, to be kept in `dir`. Those of an earlier run are removed.
    pub fn new(dir: PathBuf) -> Result<Self> {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
        }
        files::make_dir(&dir)?;
        Ok(Results { dir, suites: Vec::new() })
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

    /// The logs of attempts that did not pass, for suites with this outcome: one line for each suite.
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

    /// The `count` slowest tests, a line for each with its seconds, and the sum of all tests.
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

    /// Writes `e2e.json` and `e2e.xml`.
    pub fn write(&self, summary: &Summary) -> Result<()> {
        let json = serde_json::to_vec_pretty(&self.json(summary)).context("failed to serialize the results")?;
        let xml = self.junit(summary).to_string().context("failed to serialize the results as JUnit")?;
        for (name, content) in [("e2e.json", json), ("e2e.xml", xml.into_bytes())] {
            let (path, part) = (self.dir.join(name), self.dir.join(format!("{name}.part")));
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
                }));
            }
        }
        Json { summary, suites: self.suites.iter().map(suite).collect(), tests }
    }

    fn junit(&self, summary: &Summary) -> Report {
        let mut report = Report::new("husk-e2e");
        report.set_time(Duration::from_secs_f64(summary.seconds));
        report.add_test_suites(self.suites.iter().map(junit_suite));
        report
    }
}

/// A suite as JUnit has it: its tests of all attempts, and a test case of the suite's own for what no test explains.
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
            status.set_message("the suite was not run: the node ended before");
            Some(status)
        }
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
        AttemptOutcome::Crashed => "did not end: the node ended before",
    };
    let console = attempt.console.as_ref().map(|path| format!(", {}", path.display())).unwrap_or_default();
    format!("attempt {} {what} ({}{console})", attempt.attempt, attempt.log.display())
}

/// A test as JUnit has it: its last run, with the earlier ones as reruns if they did not pass.
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
    // The first failure is the test case's own where the test never passed; the others are reruns.
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
    let mut case = TestCase::new(name, status);
    case.set_classname(class).set_time(last.map(|test| test.duration).unwrap_or_default());
    case
}

/// A suite of a boot, while the boot is followed.
struct Followed {
    suite: String,
    attempt: usize,
    /// Relative to the results' directory.
    log: PathBuf,
    file: Option<File>,
    parser: Option<Parser>,
    begun: Option<Instant>,
    ended: Option<(AttemptOutcome, Instant)>,
}

/// The results of one boot.
pub struct BootReport {
    pub begin: Instant,
    /// The attempts that began, with their suites.
    pub attempts: Vec<(String, Attempt)>,
    pub parts: Vec<Part>,
}

/// Follows one boot of a node: divides its output into the suites' logs, and times suites and tests.
pub struct Recorder {
    dir: PathBuf,
    line: String,
    suites: Vec<Followed>,
    /// The suite whose output comes, as its index.
    current: Option<usize>,
    begin: Instant,
    /// The start of a line whose end did not come yet.
    rest: Vec<u8>,
}

impl Recorder {
    /// Begins a boot with a containerd line, in which suites run for the given attempt each, in this order. `dir` is
    /// that of the results.
    pub fn new(dir: PathBuf, line: &str, suites: &[(String, usize)]) -> Result<Self> {
        files::make_dir(&dir.join("logs").join(line))?;
        let followed = |(suite, attempt): &(String, usize)| Followed {
            suite: suite.clone(),
            attempt: *attempt,
            log: Path::new("logs").join(line).join(format!("{suite}.{attempt}.log")),
            file: None,
            parser: None,
            begun: None,
            ended: None,
        };
        let suites = suites.iter().map(followed).collect();
        Ok(Recorder { dir, line: line.to_owned(), suites, current: None, begin: Instant::now(), rest: Vec::new() })
    }

    /// Notes what came from the node.
    pub fn note(&mut self, progress: Progress<'_>) {
        let now = Instant::now();
        match progress {
            Progress::Mark(text) => self.mark(text, now),
            Progress::Output(bytes) => self.output(bytes, now),
        }
    }

    /// Notes a mark of the script: "begun", "passed" or "failed", and a suite.
    fn mark(&mut self, text: &str, now: Instant) {
        let Some((word, name)) = text.split_once(' ') else { return };
        let Some(suite) = self.suites.iter_mut().find(|followed| followed.suite == name) else { return };
        match word {
            "begun" => suite.begun = Some(now),
            "passed" => suite.ended = Some((AttemptOutcome::Passed, now)),
            "failed" => suite.ended = Some((AttemptOutcome::Failed, now)),
            _ => {}
        }
    }

    fn output(&mut self, bytes: &[u8], now: Instant) {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.line(&line, now);
        }
        let partial = String::from_utf8_lossy(&self.rest).into_owned();
        if let Some(parser) = self.current_suite().and_then(|suite| suite.parser.as_mut()) {
            parser.partial(&partial, now);
        }
    }

    fn line(&mut self, line: &[u8], now: Instant) {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end_matches(['\n', '\r']);
        // The marks come by another channel, whose order against the output is not fixed. Suites run in a known order,
        // so a test that prints such a line is not taken for the next suite.
        let next = self.current.map_or(0, |current| current + 1);
        if let Some(suite) = self.suites.get_mut(next)
            && text.strip_prefix("== ") == Some(suite.suite.as_str())
        {
            suite.parser = Some(Parser::new(now));
            suite.file = File::create(self.dir.join(&suite.log)).ok();
            self.current = Some(next);
        } else if let Some(suite) = self.current_suite() {
            if let Some(file) = &mut suite.file {
                let _ = file.write_all(line);
            }
            if let Some(parser) = &mut suite.parser {
                parser.line(text, now);
            }
        }
    }

    fn current_suite(&mut self) -> Option<&mut Followed> {
        self.suites.get_mut(self.current?)
    }

    /// Ends the recording of the boot with this number. If the node crashed, `console` is its console's log, which is
    /// kept.
    pub fn finish(mut self, console: Option<&Path>, boot: usize) -> Result<BootReport> {
        let now = Instant::now();
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            self.line(&rest, now);
        }
        let kept = match console {
            Some(console) => {
                let path = Path::new("logs").join(&self.line).join(format!("boot-{boot}.console.log"));
                let to = self.dir.join(&path);
                fs::copy(console, &to).with_context(|| format!("failed to copy the console to {}", to.display()))?;
                Some(path)
            }
            None => None,
        };
        let up = self.suites.iter().filter_map(|suite| suite.begun).min().unwrap_or(now);
        let start_up = stages::seconds(up.saturating_duration_since(self.begin));
        let mut parts = vec![Part { name: "(until the first suite)".into(), seconds: start_up }];
        let mut attempts = Vec::new();
        for suite in self.suites {
            let Some(begun) = suite.begun else { continue };
            // A log that no output reached is there too: it is named in the results.
            if suite.file.is_none() {
                let _ = File::create(self.dir.join(&suite.log));
            }
            let (outcome, ended) = suite.ended.unwrap_or((AttemptOutcome::Crashed, now));
            let seconds = stages::seconds(ended.saturating_duration_since(begun));
            parts.push(Part { name: suite.suite.clone(), seconds });
            let console = kept.clone().filter(|_| outcome == AttemptOutcome::Crashed);
            let tests = suite.parser.map(|parser| parser.finish(ended)).unwrap_or_default();
            let attempt = Attempt { attempt: suite.attempt, outcome, seconds, log: suite.log, console, tests };
            attempts.push((suite.suite, attempt));
        }
        Ok(BootReport { begin: self.begin, attempts, parts })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn summary() -> Summary {
        Summary { filter: String::new(), retry: true, emulated: true, finished: true, seconds: 9.5, stages: vec![] }
    }

    /// Runs suites in a boot that prints and marks what `script` says: lines "mark …" are marks.
    fn boot(results: &mut Results, suites: &[&str], number: usize, script: &str, crashed: bool) {
        let suites: Vec<_> =
            suites.iter().map(|name| ((*name).to_owned(), results.next_attempt("1.7", name))).collect();
        let mut recorder = Recorder::new(results.dir.clone(), "1.7", &suites).unwrap();
        for line in script.split_inclusive('\n') {
            match line.strip_prefix("mark ") {
                Some(mark) => recorder.note(Progress::Mark(mark.trim_end())),
                None => recorder.note(Progress::Output(line.as_bytes())),
            }
        }
        let console = results.dir.join("console");
        fs::write(&console, "a panic").unwrap();
        let BootReport { attempts, parts, .. } = recorder.finish(crashed.then_some(&*console), number).unwrap();
        assert_eq!(parts.len(), attempts.len() + 1);
        results.add("1.7", attempts);
    }

    const FIRST: &str = "noise\n== a\nmark begun a\ntest x ... ok\ntest y ... FAILED\n== c\nfailures:\n\n\
                         ---- y stdout ----\nwhy & <how>\n\nfailures:\n    y\n\ntest result: FAILED.\nmark failed a\n\
                         mark begun b\n== b\ntest z ... ignored, long: x\ntest result: ok.\nmark passed b\n\
                         mark begun c\n== c\ntest w ... ";

    fn sample(dir: &Path) -> Results {
        let mut results = Results::new(dir.join("results")).unwrap();
        for suite in ["a", "b", "c", "d"] {
            results.plan("1.7", suite);
        }
        boot(&mut results, &["a", "b", "c", "d"], 1, FIRST, true);
        boot(&mut results, &["a"], 2, "mark begun a\n== a\ntest x ... ok\ntest y ... ok\nmark passed a\n", false);
        results
    }

    #[test]
    fn attempts_are_kept_with_their_logs() {
        let dir = tempfile::tempdir().unwrap();
        let results = sample(dir.path());
        results.write(&summary()).unwrap();
        let read = |name: &str| fs::read_to_string(results.dir.join(name)).unwrap();
        let json: Value = serde_json::from_str(&read("e2e.json")).unwrap();
        let suites = json["suites"].as_array().unwrap();
        let outcomes: Vec<_> = suites.iter().map(|suite| suite["outcome"].as_str().unwrap()).collect();
        // The "== c" among the lines of a is not the begin of c.
        assert_eq!(outcomes, ["flaky", "passed", "failed", "not_run"]);
        let attempts = suites[0]["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 2);
        assert_eq!(
            (&attempts[0]["log"], &attempts[1]["log"]),
            (&"logs/1.7/a.1.log".into(), &"logs/1.7/a.2.log".into())
        );
        assert!(read("logs/1.7/a.1.log").contains("FAILED") && !read("logs/1.7/a.2.log").contains("FAILED"));
        assert_eq!(suites[2]["attempts"][0]["outcome"], "crashed");
        assert_eq!(read(suites[2]["attempts"][0]["console"].as_str().unwrap()), "a panic");
        let tests = json["tests"].as_array().unwrap();
        let find = |name: &str, attempt: u64| {
            tests.iter().find(|test| test["name"] == name && test["attempt"] == attempt).unwrap()
        };
        assert_eq!(find("y", 1)["outcome"], "failed");
        assert_eq!(find("y", 2)["outcome"], "passed");
        assert_eq!((&find("y", 2)["suite"], &find("y", 2)["line"]), (&"a".into(), &"1.7".into()));
        assert_eq!(find("w", 1)["outcome"], "unfinished");
        let flaky = results.with_logs(SuiteOutcome::Flaky);
        assert!(flaky.len() == 1 && flaky[0].starts_with("a with containerd 1.7 (") && flaky[0].contains("a.1.log"));
    }

    #[test]
    fn slowest_tests_come_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::new(dir.path().join("results")).unwrap();
        results.plan("1.7", "a");
        let test = |name: &str, secs| {
            let duration = Duration::from_secs(secs);
            TestRun { name: name.to_owned(), outcome: TestOutcome::Passed, duration, failure: None }
        };
        let tests = vec![test("x", 1), test("y", 30), test("z", 2)];
        let (outcome, log) = (AttemptOutcome::Passed, PathBuf::new());
        let attempt = Attempt { attempt: 1, outcome, seconds: 33.0, log, console: None, tests };
        results.add("1.7", vec![("a".to_owned(), attempt)]);
        assert_eq!(results.slowest(2), "     30.0  a y (1.7)\n      2.0  a z (1.7)\n     33.0  all 3 tests\n");
    }

    #[test]
    fn junit_tells_flaky_tests_and_unfinished_ones() {
        let dir = tempfile::tempdir().unwrap();
        let xml = sample(dir.path()).junit(&summary()).to_string().unwrap();
        assert!(xml.contains("<testsuite name=\"1.7.a\""), "{xml}");
        assert!(xml.contains("<flakyFailure ") && xml.contains("\"attempt 1 failed (logs/1.7/a.1.log)\""), "{xml}");
        assert!(
            xml.contains("<error message=\"attempt 1 did not end: the node ended before (logs/1.7/c.1.log"),
            "{xml}"
        );
        assert!(xml.contains("<skipped"), "{xml}");
        assert!(xml.contains("the suite was not run"), "{xml}");
    }
}
