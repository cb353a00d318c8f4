//! The agent's log: a ring of lines until somebody reads it over vsock; warnings and errors go to the kernel log too.
//!
//! Lines of lesser weight never reach the serial console: each byte there is an exit to the VMM.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio::io::Interest;
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, span};

use crate::vsock::Listener;

/// What waits for a reader at most; older lines go first.
const RING_BYTES: usize = 64 * 1024;

struct Ring {
    lines: VecDeque<String>,
    bytes: usize,
}

struct Log {
    ring: Mutex<Ring>,
    more: Notify,
    kmsg: Option<Mutex<File>>,
    level: Level,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Starts logging; `husk.log=debug` on the kernel's command line asks for more.
pub fn init() {
    let debug =
        std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split(' ').any(|w| w == "husk.log=debug"));
    let kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg").ok().map(Mutex::new);
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let ring = Mutex::new(Ring { lines: VecDeque::new(), bytes: 0 });
    let _ = LOG.set(Log { ring, more: Notify::new(), kmsg, level });
    let _ = tracing::subscriber::set_global_default(Subscriber);
    if log::set_logger(&Bridge).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// An error and everything that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            let _ = write!(text, ": {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Hands the log to one reader after another.
pub async fn serve(listener: Listener) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                if let Err(error) = feed(stream).await {
                    tracing::debug!("log reader left: {error}");
                }
            }
            Err(error) => {
                tracing::warn!("log port: {error}");
                return;
            }
        }
    }
}

async fn feed(stream: OwnedFd) -> std::io::Result<()> {
    let Some(log) = LOG.get() else { return Ok(()) };
    let stream = crate::io::register(File::from(stream), Interest::WRITABLE)?;
    loop {
        let line = {
            let mut ring = log.ring.lock().unwrap_or_else(PoisonError::into_inner);
            let line = ring.lines.pop_front();
            ring.bytes -= line.as_ref().map_or(0, String::len);
            line
        };
        let Some(line) = line else {
            log.more.notified().await;
            continue;
        };
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            let written = stream.async_io(Interest::WRITABLE, |mut file| file.write(rest)).await?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

fn record(level: Level, message: &str) {
    let Some(log) = LOG.get() else { return };
    let mut line = String::with_capacity(message.len() + 32);
    let now = crate::reaper::now_ns();
    let _ = writeln!(line, "{}.{:06} {level} {message}", now / 1_000_000_000, now / 1000 % 1_000_000);
    if level <= Level::WARN
        && let Some(kmsg) = &log.kmsg
    {
        let weight = if level == Level::ERROR { 3 } else { 4 };
        let text = format!("<{weight}>husk-agent: {}\n", message.replace('\n', " "));
        let _ = kmsg.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes());
    }
    let mut ring = log.ring.lock().unwrap_or_else(PoisonError::into_inner);
    ring.bytes += line.len();
    ring.lines.push_back(line);
    while ring.bytes > RING_BYTES {
        let Some(old) = ring.lines.pop_front() else { break };
        ring.bytes -= old.len();
    }
    drop(ring);
    log.more.notify_one();
}

/// The least a `tracing` subscriber can be: events become lines, spans are ignored.
struct Subscriber;

impl tracing::Subscriber for Subscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries warn of what is ordinary here; their errors come back as errors of a request.
        let level = *metadata.level();
        let ours = metadata.target().starts_with("husk") || level == Level::ERROR;
        metadata.is_event() && LOG.get().is_some_and(|log| level <= log.level && (ours || log.level == Level::DEBUG))
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        record(*event.metadata().level(), &line.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// An event's message and fields as text.
pub struct Line(pub String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

/// Lines of crates that use `log`.
struct Bridge;

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, line: &log::Record<'_>) {
        record(if line.level() == log::Level::Error { Level::WARN } else { Level::INFO }, &line.args().to_string());
    }
    fn flush(&self) {}
}
