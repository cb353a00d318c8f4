//! Text from the guest, its console and its agent's log: to the shim's log line by line, the last lines kept for errors.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::lock;

/// Lines kept.
const KEEP: usize = 40;
/// Longest line passed on; the guest may write anything.
const MAX_LINE: usize = 1024;

/// The last lines of a stream.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Tail {
    /// Keeps a line.
    pub fn push(&self, line: String) {
        let mut lines = lock(&self.lines);
        if lines.len() == KEEP {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// What tells why the guest died: from the kernel's panic on where there is one, else the last few lines.
    pub fn last_words(&self) -> String {
        let lines = lock(&self.lines);
        let panic = lines.iter().position(|line| line.contains("Kernel panic") || line.contains("panicked at"));
        let from = panic.unwrap_or_else(|| lines.len().saturating_sub(8));
        let words: Vec<&str> = lines.iter().skip(from).take(12).map(String::as_str).collect();
        words.join("\n")
    }
}

/// Reads lines until the stream ends.
pub async fn follow(mut stream: impl AsyncRead + Unpin, mut line: impl FnMut(String)) {
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

/// Without control characters: a guest must not draw on the terminal of whoever reads the log.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_clean() {
        let mut input = vec![b'x'; MAX_LINE + 10];
        input.extend_from_slice(b"\r\n\x1b[2Jhi\n\nrest");
        let mut lines = Vec::new();
        follow(input.as_slice(), |line| lines.push(line)).await;
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE, 10, 8, 4]);
        assert!(!lines[2].contains('\x1b'));
    }

    #[test]
    fn last_words_begin_at_the_panic() {
        let tail = Tail::default();
        for n in 0..60 {
            tail.push(format!("line {n}"));
        }
        assert!(tail.last_words().starts_with("line 52\n"));
        tail.push("Kernel panic - not syncing: x".into());
        tail.push("CPU: 0".into());
        assert_eq!(tail.last_words(), "Kernel panic - not syncing: x\nCPU: 0");
    }
}
