//! The log of the node's containerd.

use std::fs;

/// Returns the length of containerd's log in bytes.
pub fn len() -> usize {
    read().len()
}

/// Returns what containerd has logged since its log had the length `start`.
pub fn since(start: usize) -> String {
    String::from_utf8_lossy(read().get(start..).unwrap_or_default()).into_owned()
}

/// Returns the last lines of containerd's log. `HUSK_E2E_CONTAINERD_LOG` overrides the log's path.
pub fn log_tail(lines: usize) -> String {
    let log = read();
    let log = String::from_utf8_lossy(&log);
    let all: Vec<&str> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Returns the lines that contain one of these texts, for example ids of pods.
pub fn lines_with(texts: &[&str]) -> String {
    let log = read();
    let log = String::from_utf8_lossy(&log);
    log.lines().filter(|line| texts.iter().any(|text| line.contains(text))).collect::<Vec<_>>().join("\n")
}

fn read() -> Vec<u8> {
    let path = std::env::var("HUSK_E2E_CONTAINERD_LOG").unwrap_or_else(|_| "/var/log/containerd.log".to_owned());
    fs::read(&path).unwrap_or_else(|_| format!("(failed to read {path})").into_bytes())
}
