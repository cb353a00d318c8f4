//! Runs `cargo test` or `cargo miri test`, and reads the result of each test binary from the output.
//!
//! Cargo names a binary before it runs the binary, and says afterwards if the binary failed. Cargo writes to stderr,
//! and the binaries write to stdout and stderr. All of them write to one pipe, so that the order of the lines is right.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::libtest::{Parser, TestOutcome, TestRun};
use crate::ui;

/// If a binary failed, at most this number of lines of its output are shown.
const SHOWN_LINES: usize = 200;

/// The result of a test binary.
#[derive(Debug, PartialEq)]
pub struct Binary {
    /// For the unit tests of a library: the library's name. Names of programs end with `.bin`, names of integration
    /// tests with `.test`, and names of documentation tests with `.doc`.
    pub name: String,
    pub passed: bool,
    pub duration: Duration,
    /// The binary's tests. Empty if the binary does not use libtest.
    pub tests: Vec<TestRun>,
    /// What the binary printed.
    pub output: String,
}

impl Binary {
    /// Returns the number of tests with this outcome.
    pub fn count(&self, outcome: TestOutcome) -> usize {
        self.tests.iter().filter(|test| test.outcome == outcome).count()
    }

    /// Returns a line that says how the binary's tests ended.
    fn summary(&self) -> String {
        let seconds = self.duration.as_secs_f64();
        let result = if self.passed { "passed" } else { "FAILED" };
        if self.tests.is_empty() {
            return format!("{}: {result} in {seconds:.1} s", self.name);
        }
        let [passed, failed, unfinished, ignored] =
            [TestOutcome::Passed, TestOutcome::Failed, TestOutcome::Unfinished, TestOutcome::Ignored]
                .map(|outcome| self.count(outcome));
        let mut text = format!("{}: {result} in {seconds:.1} s: {passed} tests passed", self.name);
        for (count, what) in [(failed, "failed"), (unfinished, "did not end"), (ignored, "ignored")] {
            if count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        }
        text
    }

    /// Returns the part of the output that says why the binary failed.
    fn explanation(&self) -> String {
        let lines: Vec<&str> = self.output.lines().collect();
        let failures = lines.iter().position(|line| *line == "failures:");
        let from = failures.unwrap_or(0).max(lines.len().saturating_sub(SHOWN_LINES));
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

/// A binary that is running.
struct Running {
    name: String,
    begin: Instant,
    parser: Parser,
    failed: bool,
    output: String,
}

impl Running {
    fn end(self, now: Instant) -> Binary {
        Binary {
            name: self.name,
            passed: !self.failed,
            duration: now.saturating_duration_since(self.begin),
            tests: self.parser.finish(now),
            output: self.output,
        }
    }

    /// Whether the binary uses libtest and has no tests.
    fn is_empty(&self) -> bool {
        self.output.lines().any(|line| line == "running 0 tests") && !self.failed
    }
}

/// Reads the output of `cargo test`.
#[derive(Default)]
struct Reader {
    /// The start of a line whose end has not arrived yet.
    rest: Vec<u8>,
    running: Option<Running>,
    /// The binaries that ended and were not returned yet.
    ended: Vec<Binary>,
    /// The lines that belong to no binary, such as the messages of the compiler.
    other: String,
}

impl Reader {
    fn bytes(&mut self, bytes: &[u8], now: Instant) {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']), now);
        }
        let partial = String::from_utf8_lossy(&self.rest).into_owned();
        if let Some(running) = &mut self.running {
            running.parser.partial(&partial, now);
        }
    }

    fn line(&mut self, line: &str, now: Instant) {
        if let Some(name) = binary_name(line) {
            self.end_binary(now);
            let parser = Parser::new(now);
            self.running = Some(Running { name, begin: now, parser, failed: false, output: String::new() });
        } else if line.starts_with("error: ") && line.ends_with(" failed:") && line.contains(" target") {
            // At its end, cargo lists the targets that failed.
            self.end_binary(now);
        } else if let Some(running) = &mut self.running {
            // A test that ended the process did not complete its line.
            let failure = ["error: test failed, to rerun pass `", "error: doctest failed, to rerun pass `"];
            if let Some(at) = failure.iter().find_map(|text| line.find(text)) {
                let start = line.get(..at).unwrap_or_default();
                running.failed = true;
                running.output.push_str(start);
                running.parser.partial(start, now);
                return;
            }
            running.output.push_str(line);
            running.output.push('\n');
            running.parser.line(line, now);
        } else {
            self.other.push_str(line);
            self.other.push('\n');
        }
    }

    fn end_binary(&mut self, now: Instant) {
        if let Some(running) = self.running.take_if(|running| !running.is_empty()) {
            self.ended.push(running.end(now));
        }
        self.running = None;
    }

    /// Handles the end of the output.
    fn finish(&mut self, now: Instant) {
        if !self.rest.is_empty() {
            self.bytes(b"\n", now);
        }
        self.end_binary(now);
    }
}

/// Returns the name of the binary that a line of cargo announces.
fn binary_name(line: &str) -> Option<String> {
    if let Some(name) = line.strip_prefix("   Doc-tests ") {
        return Some(format!("{name}.doc"));
    }
    let (source, path) = line.strip_prefix("     Running ")?.strip_suffix(')')?.split_once(" (")?;
    let (name, _hash) = Path::new(path).file_name()?.to_str()?.rsplit_once('-')?;
    Some(match source {
        "unittests src/lib.rs" => name.to_owned(),
        source if source.starts_with("unittests ") => format!("{name}.bin"),
        _ => format!("{name}.test"),
    })
}

/// Runs `cargo test` or `cargo miri test`, and returns the results of all test binaries that have tests. `command` has
/// the option `--no-fail-fast`, and not the option `--quiet`. Prints a line for each binary, and why a binary failed.
/// Returns an error if cargo failed although no binary failed, for example because a crate does not compile.
pub fn run(step: &str, command: &mut Command) -> Result<Vec<Binary>> {
    let (mut pipe, writer) = std::io::pipe().context("failed to create a pipe")?;
    command.env("CARGO_TERM_COLOR", "never").stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("failed to start cargo")?;
    // `command` owns write ends of the pipe. While a write end is open, the reader sees no end of file.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (mut reader, mut binaries) = (Reader::default(), Vec::new());
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = pipe.read(&mut buffer).context("failed to read the output of cargo")?;
        match buffer.get(..count) {
            Some(bytes) if count > 0 => reader.bytes(bytes, Instant::now()),
            _ => reader.finish(Instant::now()),
        }
        for binary in reader.ended.drain(..) {
            if !binary.passed {
                ui::say(step, format!("the output of {}:", binary.name));
                eprintln!("{}", binary.explanation());
            }
            ui::say(step, binary.summary());
            binaries.push(binary);
        }
        if count == 0 {
            break;
        }
        ui::transient(step, &reader.running.as_ref().map_or_else(|| "building".into(), |running| running.name.clone()));
    }
    ui::erase();
    let status = child.wait().context("failed to wait for cargo")?;
    if !status.success() && binaries.iter().all(|binary| binary.passed) {
        bail!("cargo ended with {status}; its output:\n{}", reader.other);
    }
    Ok(binaries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<Binary>, String) {
        let (mut reader, now) = (Reader::default(), Instant::now());
        text.as_bytes().chunks(7).for_each(|bytes| reader.bytes(bytes, now));
        reader.finish(now);
        (reader.ended, reader.other)
    }

    #[test]
    fn each_binary_has_its_tests_and_its_result() {
        let (binaries, other) = read(
            "   Compiling a v0.1.0 (/a)\n    Finished `test` profile in 1s\n     \
             Running unittests src/lib.rs (target/debug/deps/a_b-0123)\n\nrunning 2 tests\ntest x::y ... ok\n\
             test z ... ignored, miri: no fork\n\ntest result: ok. 1 passed; 0 failed;\n\n     \
             Running unittests src/main.rs (target/debug/deps/a_b-4567)\n\nrunning 0 tests\n\ntest result: ok.\n\n     \
             Running tests/t/main.rs (target/debug/deps/t-89ab)\na table\n\
             error: test failed, to rerun pass `-p a-b --test t`\n   Doc-tests a_b\n\nrunning 1 test\n\
             test src/lib.rs - f (line 3) ... FAILED\n\nerror: doctest failed, to rerun pass `-p a-b --doc`\n\
             error: 2 targets failed:\n    `-p a-b --test t`\n    `-p a-b --doc`\n",
        );
        let rows: Vec<_> =
            binaries.iter().map(|binary| (binary.name.as_str(), binary.passed, binary.tests.len())).collect();
        assert_eq!(rows, [("a_b", true, 2), ("t.test", false, 0), ("a_b.doc", false, 0)]);
        let a = &binaries[0];
        assert_eq!((a.count(TestOutcome::Passed), a.count(TestOutcome::Ignored)), (1, 1));
        assert_eq!(a.tests[1].ignored.as_deref(), Some("miri: no fork"));
        assert_eq!(binaries[1].output, "a table\n");
        assert!(other.starts_with("   Compiling a") && other.ends_with("`-p a-b --doc`\n"), "{other}");
    }

    #[test]
    fn test_that_ends_the_process_is_unfinished() {
        let (binaries, _) = read(
            "     Running unittests src/main.rs (/t/a-0)\n\nrunning 2 tests\ntest x ... ok\n\
             test y ... error: test failed, to rerun pass `-p a --bin a`\n\nCaused by:\n  (signal: 6, SIGABRT)\n",
        );
        assert_eq!((binaries[0].name.as_str(), binaries[0].passed), ("a.bin", false));
        let outcomes: Vec<_> = binaries[0].tests.iter().map(|test| (test.name.as_str(), test.outcome)).collect();
        assert_eq!(outcomes, [("x", TestOutcome::Passed), ("y", TestOutcome::Unfinished)]);
        assert!(binaries[0].explanation().ends_with("SIGABRT)"));
    }

    #[test]
    fn summary_counts_tests_by_outcome() {
        let test = |outcome| TestRun::new("t", outcome, Duration::ZERO);
        let tests = vec![test(TestOutcome::Passed), test(TestOutcome::Failed), test(TestOutcome::Passed)];
        let duration = Duration::from_millis(1500);
        let mut binary = Binary { name: "a".into(), passed: false, duration, tests, output: String::new() };
        assert_eq!(binary.summary(), "a: FAILED in 1.5 s: 2 tests passed, 1 failed");
        binary.tests.clear();
        assert_eq!(binary.summary(), "a: FAILED in 1.5 s");
    }
}
