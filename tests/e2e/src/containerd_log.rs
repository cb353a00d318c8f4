//! The log of the node's containerd.

use std::fs;

/// Returns the last lines of containerd's log. `HUSK_E2E_CONTAINERD_LOG` overrides the log's path.
pub fn log_tail(lines: usize) -> String {
    let path = std::env::var("HUSK_E2E_CONTAINERD_LOG").unwrap_or_else(|_| "/var/log/containerd.log".to_owned());
    let Ok(log) = fs::read(&path) else {
        return format!("(failed to read {path})");
    };
    let log = String::from_utf8_lossy(&log);
    let all: Vec<&str> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
