//! The error trail: a file shared by all processes of a helper, with libcontainer's error lines and the init's verdict.
//!
//! libcontainer passes only the outermost message from process to process; the cause appears only in its log lines.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tracing::{Event, Level, Metadata, span};

use crate::log::Line;

static TRAIL: OnceLock<(File, PathBuf)> = OnceLock::new();

/// Prefix of the line with the reason, in runc's words, why the container's init failed.
const VERDICT: &str = "verdict: ";

/// Opens the trail at `path` and records error events in it from now on.
pub fn open(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let _ = TRAIL.set((file, path.to_owned()));
    let _ = tracing::subscriber::set_global_default(Subscriber);
    Ok(())
}

/// Appends a line. Best effort.
pub fn record(line: &str) {
    if let Some((mut file, _)) = TRAIL.get().map(|(file, path)| (file, path)) {
        let _ = file.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
    }
}

/// Appends the reason why the container's init failed.
pub fn record_verdict(reason: &str) {
    record(&format!("{VERDICT}{reason}"));
}

/// Returns the reason of a failure from the trail: the verdict, or else the first error, which is the innermost.
pub fn read_reason() -> Option<String> {
    let (_, path) = TRAIL.get()?;
    summarise(&std::fs::read_to_string(path).ok()?)
}

fn summarise(text: &str) -> Option<String> {
    let verdict = text.lines().find_map(|line| line.strip_prefix(VERDICT));
    verdict.or_else(|| text.lines().next()).map(str::to_owned)
}

/// Minimal `tracing` subscriber: records error events and ignores spans.
struct Subscriber;

impl tracing::Subscriber for Subscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        record(&line.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[cfg(test)]
mod tests {
    use super::summarise;

    #[test]
    fn summarise_prefers_the_verdict() {
        assert_eq!(summarise("deep\nouter\n").as_deref(), Some("deep"));
        assert_eq!(summarise("deep\nverdict: exec: \"x\": gone\n").as_deref(), Some("exec: \"x\": gone"));
        assert_eq!(summarise(""), None);
    }
}
