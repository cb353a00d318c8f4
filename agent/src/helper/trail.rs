//! The error trail: a file to which all processes of a helper write libcontainer's error lines.
//!
//! libcontainer passes only the outermost message from process to process. The cause appears only in its log lines. The
//! trail may also contain the verdict: the reason, in runc's words, why the container's init failed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use husk_base::log::Sink;
use tracing::{Level, Metadata};

static TRAIL: OnceLock<(File, PathBuf)> = OnceLock::new();

/// Prefix of the line with the verdict.
const VERDICT: &str = "verdict: ";

/// Opens the trail at `path` and records error events in it from now on.
pub fn open(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let _ = TRAIL.set((file, path.to_owned()));
    husk_base::log::install(&Errors);
    Ok(())
}

/// Appends a line. Best effort.
pub fn record(line: &str) {
    if let Some((mut file, _)) = TRAIL.get().map(|(file, path)| (file, path)) {
        let _ = file.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
    }
}

/// Appends the verdict: the reason why the container's init failed.
pub fn record_verdict(reason: &str) {
    record(&format!("{VERDICT}{reason}"));
}

/// Returns the reason for a failure from the trail. The reason is the verdict if the trail contains a verdict.
/// Otherwise it is the first error line, which has the innermost cause.
pub fn read_reason() -> Option<String> {
    let (_, path) = TRAIL.get()?;
    summarise(&std::fs::read_to_string(path).ok()?)
}

fn summarise(text: &str) -> Option<String> {
    let verdict = text.lines().find_map(|line| line.strip_prefix(VERDICT));
    verdict.or_else(|| text.lines().next()).map(str::to_owned)
}

/// Receives libcontainer's error events.
struct Errors;

impl Sink for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn write(&self, _: Level, message: &str, fields: &str) {
        record(&format!("{message}{fields}"));
    }
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
