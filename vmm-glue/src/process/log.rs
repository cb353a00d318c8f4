//! The VMM process's log: lines on standard error, at the level that `HUSK_VMM_LOG` sets.
//!
//! A guest can cause log lines, for example with invalid requests. Therefore the rate of lines from each call site is
//! limited. The limit also bounds the time that the device loop spends writing lines that a guest causes.
//!
//! Agent and shim log through `tracing` and `husk_base::log`. The VMM implements [`log::Log`] instead, because
//! virtiofsd and the rust-vmm crates log through the crate `log`. With this logger, the VMM links neither a subscriber
//! nor a bridge between the two. Both loggers use the limit of `husk_base::log_limit`.

use std::io::Write;
use std::str::FromStr;
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use husk_base::log_limit::{Decision, Limiter};
use husk_base::sync::lock;
use log::{LevelFilter, Log, Metadata, Record};

/// Environment variable with the log level.
const VARIABLE: &str = "HUSK_VMM_LOG";

/// Maximum number of lines that a call site may log at once.
const BURST: u32 = 20;

/// File and line of a log statement.
type CallSite = (Option<&'static str>, Option<u32>);

/// Logs to standard error, and limits the rate of lines from each call site.
struct Stderr(LazyLock<Mutex<Limiter<CallSite>>>);

static STDERR: Stderr = Stderr(LazyLock::new(|| Mutex::new(Limiter::new(BURST))));

impl Stderr {
    fn decide(&self, record: &Record<'_>) -> Decision {
        lock(&self.0).decide((record.file_static(), record.line()), Instant::now())
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let left_out = match self.decide(record) {
                Decision::Log(0) => String::new(),
                Decision::Log(count) => format!(" ({count} similar lines were left out)"),
                Decision::First => " (further similar lines are left out)".to_owned(),
                Decision::Drop => return,
            };
            // Write each line with one write(2), so that lines of several processes do not interleave. Ignore an error,
            // because a failed write cannot be reported.
            let line = format!("husk-vmm: {}: {}{left_out}\n", record.level().as_str().to_lowercase(), record.args());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging. The level is "warn" unless the environment variable sets another level.
pub fn init() {
    let level = std::env::var(VARIABLE).ok().and_then(|text| LevelFilter::from_str(&text).ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    // The hash table needs random keys, and the filters of most threads do not allow getrandom. Without this line, the
    // first warning of a vCPU's thread would end the VM.
    LazyLock::force(&STDERR.0);
    // This call fails only if there is already a logger. In this case, the existing logger stays.
    let _ = log::set_logger(&STDERR);
}
