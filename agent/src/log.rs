//! The agent's log: a ring buffer of lines that the host reads over vsock. Warnings and errors also go to the kernel
//! log.
//!
//! Lines of lower levels never reach the serial console, because each byte that is written there causes a VM exit.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock};

use husk_base::log::Sink;
use husk_base::sync::lock;
use husk_proto::AUDIT_PREFIX;
use tokio::io::Interest;
use tokio::sync::Notify;
use tracing::{Level, Metadata};

use crate::vsock::Listener;

/// Maximum total size of the unread lines, in bytes. The oldest lines are dropped first.
const RING_BYTES: usize = 64 * 1024;

struct Ring {
    lines: VecDeque<String>,
    bytes: usize,
}

struct Log {
    ring: Mutex<Ring>,
    new_line: Notify,
    kmsg: Option<Mutex<File>>,
    level: Level,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Initialises logging. `husk.log=debug` on the kernel command line enables debug lines.
pub fn init() {
    let debug =
        std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split(' ').any(|w| w == "husk.log=debug"));
    let kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg").ok().map(Mutex::new);
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let ring = Mutex::new(Ring { lines: VecDeque::new(), bytes: 0 });
    let _ = LOG.set(Log { ring, new_line: Notify::new(), kmsg, level });
    husk_base::log::install(&Events);
    if log::set_logger(&LogBridge).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// Serves the log to one reader at a time.
pub async fn serve(listener: Listener) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                if let Err(error) = send_lines(stream).await {
                    tracing::debug!("failed to send the log to its reader: {error}");
                }
            }
            Err(error) => {
                tracing::warn!("failed to accept a connection to the log port: {error}");
                return;
            }
        }
    }
}

async fn send_lines(stream: OwnedFd) -> std::io::Result<()> {
    let Some(log) = LOG.get() else { return Ok(()) };
    let stream = husk_base::async_fd::register(File::from(stream), Interest::WRITABLE)?;
    loop {
        let line = {
            let mut ring = lock(&log.ring);
            let line = ring.lines.pop_front();
            ring.bytes -= line.as_ref().map_or(0, String::len);
            line
        };
        let Some(line) = line else {
            log.new_line.notified().await;
            continue;
        };
        let mut remaining = line.as_bytes();
        while !remaining.is_empty() {
            let written = stream.async_io(Interest::WRITABLE, |mut file| file.write(remaining)).await?;
            remaining = remaining.get(written..).unwrap_or_default();
        }
    }
}

/// Records a refusal. The line does not go to the kernel log, because a client can cause many such
/// lines.
pub fn audit(message: &str) {
    record(Level::INFO, &format!("{AUDIT_PREFIX}{message}"));
}

fn record(level: Level, message: &str) {
    let Some(log) = LOG.get() else { return };
    let mut line = String::with_capacity(message.len() + 32);
    let now = crate::reaper::now_ns();
    let _ = writeln!(line, "{}.{:06} {level} {message}", now / 1_000_000_000, now / 1000 % 1_000_000);
    if level <= Level::WARN
        && let Some(kmsg) = &log.kmsg
    {
        let priority = if level == Level::ERROR { 3 } else { 4 };
        let text = format!("<{priority}>husk-agent: {}\n", message.replace('\n', " "));
        let _ = lock(kmsg).write_all(text.as_bytes());
    }
    let mut ring = lock(&log.ring);
    ring.bytes += line.len();
    ring.lines.push_back(line);
    while ring.bytes > RING_BYTES {
        let Some(old) = ring.lines.pop_front() else { break };
        ring.bytes -= old.len();
    }
    drop(ring);
    log.new_line.notify_one();
}

/// Receives the events of the agent and of its libraries.
struct Events;

impl Sink for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries log warnings for conditions that are normal in a guest, and return real failures as errors to the
        // agent. Therefore warnings of libraries are recorded only if debug lines are enabled.
        let level = *metadata.level();
        let from_husk = metadata.target().starts_with("husk") || level == Level::ERROR;
        LOG.get().is_some_and(|log| level <= log.level && (from_husk || log.level == Level::DEBUG))
    }

    fn write(&self, metadata: &'static Metadata<'static>, message: &str, fields: &str) {
        record(*metadata.level(), &format!("{message}{fields}"));
    }
}

/// Forwards records of the `log` crate.
struct LogBridge;

impl log::Log for LogBridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, line: &log::Record<'_>) {
        record(if line.level() == log::Level::Error { Level::WARN } else { Level::INFO }, &line.args().to_string());
    }
    fn flush(&self) {}
}
