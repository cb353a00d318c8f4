//! Prints progress to stderr. Each line has the time since the first line was printed.

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use husk_base::sys::terminal;

static START: OnceLock<Instant> = OnceLock::new();

/// Returns the time since the first line was printed.
pub fn elapsed() -> Duration {
    START.get_or_init(Instant::now).elapsed()
}

/// Whether stderr is a terminal, where a line can be overwritten.
pub fn live() -> bool {
    std::io::stderr().is_terminal()
}

fn clock() -> String {
    let s = elapsed().as_secs_f64();
    if s < 60.0 { format!("[{s:6.1}s]") } else { format!("[{:3}m{:02}s]", s as u64 / 60, s as u64 % 60) }
}

/// Prints a line for `step`.
pub fn say(step: &str, text: impl AsRef<str>) {
    erase();
    eprintln!("{} {step}: {}", clock(), text.as_ref());
}

/// Shows a line that the next line overwrites. Does nothing if stderr is not a terminal.
pub fn transient(step: &str, text: &str) {
    if !live() {
        return;
    }
    let width = terminal_width().saturating_sub(1);
    let line: String = format!("{} {step}: {}", clock(), text.trim()).chars().take(width).collect();
    eprint!("\r\x1b[K{line}");
    let _ = std::io::stderr().flush();
}

/// Erases a transient line.
pub fn erase() {
    if live() {
        eprint!("\r\x1b[K");
    }
}

/// Prints an error and its causes.
pub fn failed(error: &anyhow::Error) {
    erase();
    eprintln!("{} failed: {error}", clock());
    for cause in error.chain().skip(1) {
        eprintln!("    because: {cause}");
    }
}

fn terminal_width() -> usize {
    match terminal::window_size(std::io::stderr()) {
        Ok((columns, _)) if columns > 20 => columns.into(),
        _ => 100,
    }
}
