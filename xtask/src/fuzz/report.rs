//! Reads the results of fuzz targets from libFuzzer's output, and formats a table of these results.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::paths;

/// The result of one target.
#[derive(Debug, Default, PartialEq)]
pub struct Row {
    pub target: String,
    /// Number of inputs that were run.
    pub runs: u64,
    pub seconds: u64,
    /// Number of coverage counters (edges of the control flow) that the inputs have reached.
    pub counters: u64,
    /// Number of features. A feature is a coverage counter together with a range of the counter's value.
    pub features: u64,
    /// Number of inputs in the corpus.
    pub corpus: u64,
    /// If the target found a defect, the line of libFuzzer's output that describes the failure.
    pub failure: Option<String>,
}

impl Row {
    /// Reads the output of a target that ran for `duration`.
    pub fn new(target: &str, duration: Duration, success: bool, log: &str) -> Self {
        // A progress line: `#1024 NEW cov: 52 ft: 101 corp: 12/345b lim: 4 exec/s: 0 rss: 60Mb …`.
        let progress =
            log.lines().rev().find(|line| line.starts_with('#') && line.contains(" cov: ")).unwrap_or_default();
        let after = |name: &str| {
            let mut words = progress.split_whitespace().skip_while(|word| *word != name).skip(1);
            words.next().and_then(|word| word.split('/').next()?.parse().ok()).unwrap_or_default()
        };
        let statistic = |name: &str| {
            let value = log.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            value.unwrap_or_default()
        };
        Self {
            target: target.to_owned(),
            runs: statistic("stat::number_of_executed_units:"),
            seconds: duration.as_secs(),
            counters: after("cov:"),
            features: after("ft:"),
            corpus: after("corp:"),
            failure: (!success).then(|| failure(log)),
        }
    }
}

/// Returns a description of a failure: the panic message or, if there is no panic, libFuzzer's summary.
fn failure(log: &str) -> String {
    let mut lines = log.lines().skip_while(|line| !line.contains("panicked at"));
    let panic = lines.next().zip(lines.next()).map(|(place, message)| format!("{place} {message}"));
    let summary = || log.lines().find(|line| line.starts_with("SUMMARY:")).or_else(|| log.lines().last());
    panic.or_else(|| summary().map(str::to_owned)).unwrap_or_default()
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { runs, seconds, counters, features, .. } = self;
        write!(f, "{runs} runs in {seconds} s, {counters} coverage counters, {features} features")?;
        if let Some(failure) = &self.failure {
            write!(f, ", FAILED: {failure}")?;
        }
        Ok(())
    }
}

/// Returns the table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| target | runs | seconds | coverage counters | features | corpus | failures |\n\
                    | --- | --: | --: | --: | --: | --: | --- |\n"
        .to_owned();
    for Row { target, runs, seconds, counters, features, corpus, failure } in rows {
        let failure = failure.as_deref().unwrap_or("0").replace('|', "\\|");
        text += &format!("| `{target}` | {runs} | {seconds} | {counters} | {features} | {corpus} | {failure} |\n");
    }
    text
}

/// Writes the table to `fuzz.md` in the results directory.
pub fn write(rows: &[Row]) -> Result<()> {
    let path = paths::results().join("fuzz.md");
    fs::create_dir_all(paths::results()).with_context(|| format!("failed to create {}", paths::results().display()))?;
    fs::write(&path, table(rows)).with_context(|| format!("failed to write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "INFO: Loaded 1 modules   (9 inline 8-bit counters): 9 [0x1, 0x2),\n\
        #2\tINITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 40Mb\n\
        #1048576\tpulse  cov: 52 ft: 101 corp: 12/345b lim: 4096 exec/s: 5000 rss: 60Mb\n";

    #[test]
    fn row_has_the_figures_of_the_last_progress_line() {
        let log = format!("{LOG}Done 2000000 runs in 61 second(s)\nstat::number_of_executed_units: 2000000\n");
        let row = Row::new("blk", Duration::from_millis(61_200), true, &log);
        let target = "blk".to_owned();
        let (runs, seconds, counters, features, corpus) = (2_000_000, 61, 52, 101, 12);
        assert_eq!(row, Row { target, runs, seconds, counters, features, corpus, failure: None });
        assert!(table(&[row]).ends_with("\n| `blk` | 2000000 | 61 | 52 | 101 | 12 | 0 |\n"));
    }

    #[test]
    fn failure_is_the_panic_or_the_summary() {
        let of = |log: &str| Row::new("blk", Duration::ZERO, false, log).failure.unwrap();
        let panic =
            format!("{LOG}thread '<unnamed>' panicked at a.rs:1:2:\noverflow\nSUMMARY: libFuzzer: deadly signal\n");
        assert_eq!(of(&panic), "thread '<unnamed>' panicked at a.rs:1:2: overflow");
        assert_eq!(of(&format!("{LOG}SUMMARY: libFuzzer: timeout\n")), "SUMMARY: libFuzzer: timeout");
    }
}
