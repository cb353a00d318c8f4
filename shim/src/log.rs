//! The shim's log. As containerd's Go shims do, the shim writes logfmt lines to a fifo. containerd copies the lines to
//! its own log.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use husk_base::log::{Sink, Value};
use husk_base::log_limit::{Decision, Limiter};
use husk_config::LogLevel;
use tracing::callsite::Identifier;

use crate::lock;

/// Maximum line length in bytes. Writes of at most this length to a pipe are atomic (PIPE_BUF in pipe(7)). Therefore,
/// lines of several threads do not interleave.
const MAX_LINE: usize = 4096;

/// Maximum number of lines that a source may log at once.
const BURST: u32 = 300;

/// The current log level, from 1 (error) to 5 (trace).
static LEVEL: AtomicU8 = AtomicU8::new(3);

struct Logger {
    fifo: Option<File>,
    sandbox: String,
    namespace: String,
    dropped: AtomicU64,
    limiter: Mutex<Limiter<Identifier>>,
    /// Limits the rate of records from the `log` crate. A record's source is the file and line that logged the record.
    record_limiter: Mutex<Limiter<(Option<&'static str>, Option<u32>)>>,
}

/// Starts logging to the bundle's `log` fifo. Every line names the sandbox.
pub fn init(bundle: &Path, namespace: &str, sandbox: &str, debug: bool) {
    if debug {
        set_level(LogLevel::Debug);
    }
    // Open the fifo in non-blocking mode, because a write must not wait for a slow or dead containerd.
    let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let fifo = File::options().write(true).custom_flags(options).open(bundle.join("log")).ok();
    let logger = Logger {
        fifo,
        sandbox: sandbox.to_owned(),
        namespace: namespace.to_owned(),
        dropped: AtomicU64::new(0),
        limiter: Mutex::new(Limiter::new(BURST)),
        record_limiter: Mutex::new(Limiter::new(BURST)),
    };
    // The logger is leaked, because the crates `husk_base` and `log` need a `'static` logger. The process creates only
    // one logger.
    let logger: &'static Logger = Box::leak(Box::new(logger));
    husk_base::log::install(logger);
    if log::set_logger(logger).is_ok() {
        log::set_max_level(log::LevelFilter::Trace);
    }
}

/// Sets the log level.
pub fn set_level(level: LogLevel) {
    let severity = match level {
        LogLevel::Error => 1,
        LogLevel::Warn => 2,
        LogLevel::Info => 3,
        LogLevel::Debug => 4,
        LogLevel::Trace => 5,
    };
    LEVEL.store(severity, Ordering::Relaxed);
    tracing::callsite::rebuild_interest_cache();
}

impl Logger {
    fn write_line(&self, level: &str, message: &str, fields: &str) {
        let Some(mut fifo) = self.fifo.as_ref() else { return };
        let mut line = String::with_capacity(256);
        let _ = write!(line, "time=\"{}\" level={level} msg=", rfc3339(SystemTime::now()));
        quote(&mut line, message);
        line.push_str(fields);
        let mut suffix = format!(" runtime=husk namespace={} sandbox={}", self.namespace, self.sandbox);
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let _ = write!(suffix, " dropped={dropped}");
        }
        suffix.push('\n');
        truncate(&mut line, MAX_LINE.saturating_sub(suffix.len()));
        line.push_str(&suffix);
        if fifo.write_all(line.as_bytes()).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }

    /// Writes or drops a line, as `decision` says. For [`Decision::First`], writes a warning instead of the line.
    fn write_limited(&self, decision: &Decision, source: &str, level: &str, message: &str, fields: &str) {
        match decision {
            Decision::Log(0) => self.write_line(level, message, fields),
            Decision::Log(left_out) => self.write_line(level, message, &format!("{fields} left_out={left_out}")),
            Decision::First => {
                let source = format!(" source={source}");
                self.write_line(
                    "warning",
                    "too many log lines from one source; further lines from this source are left out",
                    &source,
                );
            }
            Decision::Drop => {}
        }
    }
}

impl Sink for Logger {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        severity(*metadata.level()) <= LEVEL.load(Ordering::Relaxed)
    }

    fn write(&self, metadata: &'static tracing::Metadata<'static>, message: &str, fields: &str) {
        let level = level_name(severity(*metadata.level()));
        let decision = lock(&self.limiter).decide(metadata.callsite(), Instant::now());
        self.write_limited(&decision, metadata.target(), level, message, fields);
    }

    fn field(&self, fields: &mut String, name: &str, value: Value<'_>) {
        let _ = write!(fields, " {name}=");
        quote(fields, &value.to_string());
    }
}

fn severity(level: tracing::Level) -> u8 {
    match level {
        tracing::Level::ERROR => 1,
        tracing::Level::WARN => 2,
        tracing::Level::INFO => 3,
        tracing::Level::DEBUG => 4,
        tracing::Level::TRACE => 5,
    }
}

fn record_severity(level: log::Level) -> u8 {
    match level {
        log::Level::Error => 1,
        log::Level::Warn => 2,
        log::Level::Info => 3,
        log::Level::Debug => 4,
        log::Level::Trace => 5,
    }
}

/// Returns the name that containerd's Go shims write for a severity.
fn level_name(severity: u8) -> &'static str {
    match severity {
        1 => "error",
        2 => "warning",
        3 => "info",
        4 => "debug",
        _ => "trace",
    }
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        record_severity(metadata.level()) <= LEVEL.load(Ordering::Relaxed)
    }

    fn log(&self, record: &log::Record<'_>) {
        if log::Log::enabled(self, record.metadata()) {
            let level = level_name(record_severity(record.level()));
            let call_site = (record.file_static(), record.line());
            let decision = lock(&self.record_limiter).decide(call_site, Instant::now());
            self.write_limited(&decision, record.target(), level, &record.args().to_string(), "");
        }
    }

    fn flush(&self) {}
}

/// Appends a value. Quotes and escapes a value that is empty or contains special characters.
fn quote(out: &mut String, value: &str) {
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '/' | '@' | '^' | '+');
    if !value.is_empty() && value.chars().all(bare) {
        out.push_str(value);
    } else {
        let _ = write!(out, "{value:?}");
    }
}

/// Cuts a line to at most `length` bytes. If the cut is in a quoted value, adds the closing quotation mark.
fn truncate(line: &mut String, length: usize) {
    const MARK: &str = "…\"";
    if line.len() > length {
        let kept = length.saturating_sub(MARK.len());
        let end = (0..=kept).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
        line.truncate(end);
        let (mut is_quoted, mut is_escaped) = (false, false);
        for c in line.chars() {
            is_quoted ^= c == '"' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
        }
        if is_escaped {
            // The cut is within an escape sequence. Remove the backslash, which would otherwise escape the ellipsis.
            line.pop();
        }
        line.push_str(if is_quoted { MARK } else { "…" });
    }
}

/// Formats a time as RFC 3339 in UTC, with nanoseconds.
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

/// Converts a number of days since 1970-01-01 to year, month and day.
///
/// The calculation uses the 400-year eras of the Gregorian calendar.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rfc3339_handles_leap_and_century_years() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59.000000000Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn truncate_limits_the_length_and_closes_quotes() {
        for (text, expected) in [("msg=\"a b c d e f\"", "msg=\"a …\""), ("msg=abcdefghijkl", "msg=abc…")] {
            let mut line = text.to_owned();
            truncate(&mut line, 11);
            assert_eq!(line, expected);
            assert!(line.len() <= 11);
        }
    }

    #[test]
    fn truncate_understands_escaped_backslashes_and_quotes() {
        for (text, length, expected) in [
            (r#"m="\\" k="b c d e f""#, 16, r#"m="\\" k="b …""#),
            (r#"msg="a b\"c d""#, 13, r#"msg="a b…""#),
            (r#"msg="a\"b c d e""#, 13, r#"msg="a\"b…""#),
        ] {
            let mut line = text.to_owned();
            truncate(&mut line, length);
            assert_eq!(line, expected);
        }
    }

    #[test]
    fn warnings_of_the_log_crate_have_the_level_warning() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let logger = Logger {
            fifo: Some(file.reopen().unwrap()),
            sandbox: "s".into(),
            namespace: "n".into(),
            dropped: AtomicU64::new(0),
            limiter: Mutex::new(Limiter::new(BURST)),
            record_limiter: Mutex::new(Limiter::new(BURST)),
        };
        let record = log::Record::builder().level(log::Level::Warn).args(format_args!("text")).build();
        log::Log::log(&logger, &record);
        let line = std::fs::read_to_string(file.path()).unwrap();
        assert!(line.contains(" level=warning msg=text "), "{line}");
    }

    #[test]
    fn quote_adds_quotes_only_if_the_value_needs_quotes() {
        let quoted = |value: &str| {
            let mut out = String::new();
            quote(&mut out, value);
            out
        };
        assert_eq!(quoted("plain-1"), "plain-1");
        assert_eq!(quoted("two words"), "\"two words\"");
        assert_eq!(quoted(""), "\"\"");
        assert_eq!(quoted("a\nb\"c"), r#""a\nb\"c""#);
    }
}
