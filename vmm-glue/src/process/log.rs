//! The VMM process's log: lines on standard error, at the level that `HUSK_VMM_LOG` sets.

use std::io::Write;
use std::str::FromStr;

use log::{LevelFilter, Log, Metadata, Record};

/// Environment variable with the log level.
const VARIABLE: &str = "HUSK_VMM_LOG";

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // Write each line with one write(2), so that lines of several processes do not interleave. Ignore an error,
            // because a failed write cannot be reported.
            let line = format!("husk-vmm: {}: {}\n", record.level().as_str().to_lowercase(), record.args());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging. The level is "warn" unless the environment variable sets another level.
pub fn init() {
    let level = std::env::var(VARIABLE).ok().and_then(|text| LevelFilter::from_str(&text).ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    // This call fails only if there is already a logger. In this case, the existing logger stays.
    let _ = log::set_logger(&Stderr);
}
