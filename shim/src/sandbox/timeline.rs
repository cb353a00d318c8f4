//! Timeline of a sandbox's start, with steps of the shim and the VMM. The timeline is saved in the sandbox's directory.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use husk_config::timeline::Timeline as Record;
use nix::time::ClockId;

use crate::{blocking, lock};

/// Maximum number of steps. The maximum bounds the shim's memory in a pod with many containers.
const MAX_STEPS: usize = 256;

/// How long the end of a sandbox waits until its timeline is in the timeline log.
const APPEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A timeline to which several threads add steps.
#[derive(Debug)]
pub struct Timeline {
    record: Mutex<Record>,
    file: PathBuf,
}

/// Returns the time of the monotonic clock in nanoseconds. All processes of the host share this clock.
pub fn now() -> u64 {
    // Reading the clock does not fail, because every Linux kernel has this clock.
    let now = ClockId::CLOCK_MONOTONIC.now().map_or_else(|_| Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl Timeline {
    /// Returns an empty timeline. [`Timeline::save`] saves the timeline in `file`.
    pub fn new(namespace: &str, sandbox: &str, file: PathBuf) -> Self {
        let record = Record { sandbox: sandbox.to_owned(), namespace: namespace.to_owned(), steps: Vec::new() };
        Self { record: Mutex::new(record), file }
    }

    /// Adds a step with the current time.
    pub fn mark(&self, name: &str) {
        self.mark_at(name, now());
    }

    /// Adds a step with a time that was measured elsewhere, for example in the VMM.
    pub fn mark_at(&self, name: &str, at_ns: u64) {
        let mut record = lock(&self.record);
        if record.steps.len() < MAX_STEPS {
            record.push(name, at_ns);
        }
    }

    /// Saves the timeline to its file.
    pub fn save(&self) {
        let line = lock(&self.record).to_line();
        if let Ok(line) = line
            && let Err(error) = std::fs::write(&self.file, line)
        {
            tracing::debug!(%error, "failed to write the timeline");
        }
    }

    /// Logs the timeline, and appends the timeline to the file `log`. If `log` is empty, only logs the timeline. If the
    /// file system of the file hangs, gives up after `APPEND_TIMEOUT`.
    pub async fn finish(&self, log: &Path) {
        let record = lock(&self.record).clone();
        let first = record.steps.first().map_or(0, |step| step.at_ns);
        let text: Vec<String> = record
            .steps
            .iter()
            .map(|step| format!("{} {:.1}", step.name, (step.at_ns.saturating_sub(first)) as f64 / 1e6))
            .collect();
        tracing::info!(steps = %text.join(", "), "timeline in ms");
        if log.as_os_str().is_empty() {
            return;
        }
        let path = log.to_owned();
        let append = blocking::spawn(move || {
            let line = record.to_line().map_err(io::Error::other)?;
            // Write the line with a single write(2), so that lines of several shims do not interleave.
            std::fs::OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
        });
        let written = match tokio::time::timeout(APPEND_TIMEOUT, append).await {
            Ok(written) => written.and_then(|written| written),
            Err(_) => Err(io::Error::other("the file system does not answer")),
        };
        if let Err(error) = written {
            tracing::warn!(%error, path = %log.display(), "failed to append the timeline to the timeline log");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_steps_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("timeline.json");
        let timeline = Timeline::new("default", "one", file.clone());
        for at in 0..10 * MAX_STEPS as u64 {
            timeline.mark_at("first guest instruction", at);
        }
        timeline.save();
        let saved = Record::from_lines(&std::fs::read_to_string(file).unwrap()).unwrap();
        assert_eq!(saved[0].steps.len(), MAX_STEPS);
    }
}
