//! Records a boot of a node: divides the node's output into the logs of the suites, and times suites and tests.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use super::outcome::{Attempt, AttemptOutcome};
use crate::files;
use crate::libtest::Parser;
use crate::node::Progress;
use crate::stages::{self, Part};

/// A suite of a boot that is being recorded.
struct Followed {
    suite: String,
    attempt: usize,
    /// The path of the suite's log, relative to the results' directory.
    log: PathBuf,
    file: Option<File>,
    parser: Option<Parser>,
    begun: Option<Instant>,
    ended: Option<(AttemptOutcome, Instant)>,
}

/// The results of one boot.
pub struct BootReport {
    pub begin: Instant,
    /// The attempts that began, with the names of their suites.
    pub attempts: Vec<(String, Attempt)>,
    pub parts: Vec<Part>,
}

/// The recording of one boot.
pub struct Recorder {
    dir: PathBuf,
    line: String,
    suites: Vec<Followed>,
    /// The index of the suite whose output arrives now.
    current: Option<usize>,
    begin: Instant,
    /// The start of a line whose end has not arrived yet.
    rest: Vec<u8>,
}

impl Recorder {
    /// Begins to record a boot with a containerd line. `suites` has the suites in the order in which they run, each
    /// with the number of its attempt. `dir` is the results' directory.
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

    /// Records an event of the node's script.
    pub fn note(&mut self, progress: Progress<'_>) {
        let now = Instant::now();
        match progress {
            Progress::Mark(text) => self.mark(text, now),
            Progress::Output(bytes) => self.output(bytes, now),
        }
    }

    /// Records a mark of the script: "begun", "passed" or "failed", and the name of a suite.
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
        // The line "== SUITE" says which suite's output follows. The marks cannot say this, because they may arrive
        // before or after the output. Only a line with the name of the next suite counts, because a test may print a
        // line of this form too.
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

    /// Ends the recording. `boot` is the boot's number. If the node crashed, `console` is the path of its console's
    /// log, which is copied to the results.
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
                fs::copy(console, &to)
                    .with_context(|| format!("failed to copy the console's log to {}", to.display()))?;
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
            // The results name the log of each suite, so the file must exist even if the suite printed nothing.
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
