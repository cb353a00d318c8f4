//! What libcontainer logs as errors, and why an init gave up, kept in a file that all of the helper's processes share.
//!
//! libcontainer hands only the outermost message from process to process; the cause is in its log lines.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tracing::{Event, Level, Metadata, span};

use crate::log::Line;

static TRAIL: OnceLock<(File, PathBuf)> = OnceLock::new();

/// Marks a line that says, in runc's words, why the container's init gave up.
const VERDICT: &str = "verdict: ";

/// Starts the trail at `path`.
pub fn open(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let _ = TRAIL.set((file, path.to_owned()));
    let _ = tracing::subscriber::set_global_default(Subscriber);
    Ok(())
}

/// Adds a line.
pub fn record(line: &str) {
    if let Some((mut file, _)) = TRAIL.get().map(|(file, path)| (file, path)) {
        let _ = file.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
    }
}

/// Adds the reason for giving up.
pub fn verdict(reason: &str) {
    record(&format!("{VERDICT}{reason}"));
}

/// What the trail says about a failure: the verdict, or else the first error, which is the deepest.
pub fn read_own() -> Option<String> {
    let (_, path) = TRAIL.get()?;
    summarise(&std::fs::read_to_string(path).ok()?)
}

fn summarise(text: &str) -> Option<String> {
    let verdict = text.lines().find_map(|line| line.strip_prefix(VERDICT));
    verdict.or_else(|| text.lines().next()).map(str::to_owned)
}

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
    fn the_verdict_wins_over_the_first_line() {
        assert_eq!(summarise("deep\nouter\n").as_deref(), Some("deep"));
        assert_eq!(summarise("deep\nverdict: exec: \"x\": gone\n").as_deref(), Some("exec: \"x\": gone"));
        assert_eq!(summarise(""), None);
    }
}
