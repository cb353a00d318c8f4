//! Reads the lines of the guest's console, of the VMM's log and of the agent's log.
//!
//! The shim writes these lines to its own log. For error messages, the shim keeps the most recent lines of the
//! console and of the VMM's log.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::lock;
use crate::text::clean;

/// Maximum number of lines in a [`LogTail`].
const MAX_LINES: usize = 40;
/// Maximum length of a line, in bytes. Without this limit, a guest could fill the shim's memory with one line.
const MAX_LINE: usize = 1024;

/// The most recent lines of the console and of the VMM's log.
#[derive(Debug, Clone, Default)]
pub struct LogTail {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl LogTail {
    /// Adds a line. If there are already `MAX_LINES` lines, first drops the oldest line.
    pub fn push(&self, line: String) {
        let mut lines = lock(&self.lines);
        if lines.len() == MAX_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// Returns the lines that may explain why the guest ended.
    ///
    /// If a line reports a panic, returns this line and up to 11 lines after it. Otherwise, returns the last 8 lines.
    pub fn console_tail(&self) -> String {
        let lines = lock(&self.lines);
        let panic = lines.iter().position(|line| line.contains("Kernel panic") || line.contains("panicked at"));
        let from = panic.unwrap_or_else(|| lines.len().saturating_sub(8));
        let explanation: Vec<&str> = lines.iter().skip(from).take(12).map(String::as_str).collect();
        explanation.join("\n")
    }
}

/// Reads `stream` until EOF or an error, and calls `line` with each line. Splits lines that are longer than `MAX_LINE`.
pub async fn read_lines(mut stream: impl AsyncRead + Unpin, mut line: impl FnMut(String)) {
    let mut buffer = [0; 2048];
    let mut text = Vec::new();
    loop {
        let length = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        for byte in buffer.iter().take(length).copied() {
            if byte == b'\n' || text.len() == MAX_LINE {
                emit(&mut text, &mut line);
            }
            if byte != b'\n' && byte != b'\r' {
                text.push(byte);
            }
        }
    }
    emit(&mut text, &mut line);
}

fn emit(text: &mut Vec<u8>, line: &mut impl FnMut(String)) {
    if !text.is_empty() {
        line(clean(&String::from_utf8_lossy(text)));
        text.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn read_lines_splits_long_lines_and_replaces_control_characters() {
        let mut input = vec![b'x'; MAX_LINE + 10];
        input.extend_from_slice(b"\r\n\x1b[2Jhi\n\nrest");
        let mut lines = Vec::new();
        read_lines(input.as_slice(), |line| lines.push(line)).await;
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE, 10, 8, 4]);
        assert!(!lines[2].contains('\x1b'));
    }

    #[test]
    fn console_tail_begins_at_the_panic() {
        let tail = LogTail::default();
        for n in 0..60 {
            tail.push(format!("line {n}"));
        }
        assert!(tail.console_tail().starts_with("line 52\n"));
        tail.push("Kernel panic - not syncing: x".into());
        tail.push("CPU: 0".into());
        assert_eq!(tail.console_tail(), "Kernel panic - not syncing: x\nCPU: 0");
    }
}
