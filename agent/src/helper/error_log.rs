//! The error log: a file to which a helper and the processes that it forks write libcontainer's error lines.
//!
//! libcontainer passes only the outermost message from process to process. The cause appears only in libcontainer's log
//! lines. Therefore the helper collects these lines. The error log may also contain a recorded reason: a line that says
//! why the container's init failed, in the wording of runc's errors.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use husk_base::log::Sink;
use tracing::{Level, Metadata};

static LOG: OnceLock<(File, PathBuf)> = OnceLock::new();

/// Prefix of the line with the recorded reason.
const REASON: &str = "reason: ";

/// Opens the log at `path` and records error events in it from now on.
pub fn open(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let _ = LOG.set((file, path.to_owned()));
    husk_base::log::install(&ErrorSink);
    Ok(())
}

/// Appends a line. Best effort.
pub fn record(line: &str) {
    if let Some((mut file, _)) = LOG.get().map(|(file, path)| (file, path)) {
        let _ = file.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
    }
}

/// Appends the reason why the container's init failed.
pub fn record_reason(reason: &str) {
    record(&format!("{REASON}{reason}"));
}

/// Returns the reason for a failure. This is the recorded reason if the log contains one. Otherwise it is the first
/// error line, which has the innermost cause.
pub fn read_reason() -> Option<String> {
    let (_, path) = LOG.get()?;
    find_reason(&std::fs::read_to_string(path).ok()?)
}

fn find_reason(text: &str) -> Option<String> {
    let recorded = text.lines().find_map(|line| line.strip_prefix(REASON));
    recorded.or_else(|| text.lines().next()).map(str::to_owned)
}

/// Receives libcontainer's error events.
struct ErrorSink;

impl Sink for ErrorSink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn write(&self, _: &'static Metadata<'static>, message: &str, fields: &str) {
        record(&format!("{message}{fields}"));
    }
}

#[cfg(test)]
mod tests {
    use super::find_reason;

    #[test]
    fn find_reason_prefers_the_recorded_reason() {
        assert_eq!(find_reason("deep\nouter\n").as_deref(), Some("deep"));
        assert_eq!(find_reason("deep\nreason: exec: \"x\": gone\n").as_deref(), Some("exec: \"x\": gone"));
        assert_eq!(find_reason(""), None);
    }
}
