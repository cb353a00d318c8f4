//! The VMM process' log: lines on standard error, as much as `HUSK_VMM_LOG` asks for.

use std::io::Write;
use std::str::FromStr;

use log::{LevelFilter, Log, Metadata, Record};

/// The environment variable that holds the level.
const VARIABLE: &str = "HUSK_VMM_LOG";

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // One write a line, so that lines of several processes do not mix; nobody to tell when it fails.
            let line = format!("husk-vmm: {}: {}\n", record.level().as_str().to_lowercase(), record.args());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging, warnings and errors unless the environment says otherwise.
pub fn init() {
    let level = std::env::var(VARIABLE).ok().and_then(|text| LevelFilter::from_str(&text).ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    // Fails only when there is a logger already, and then that one is as good.
    let _ = log::set_logger(&Stderr);
}
