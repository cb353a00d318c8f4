//! Prepares a guest that becomes a template: a saved guest from which other guests are made.

use std::fs;
use std::sync::Arc;

use husk_base::error::chain;
use husk_proto::TEMPLATE_PARAMETER;
use husk_proto::boot_mark::BootMark;

use super::{boot_mark, trial};
use crate::task::Tasks;
use crate::{fatal, vsock};

/// Returns whether this guest becomes a template, or was made from one.
pub fn is_template() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| has_parameter(&line))
}

fn has_parameter(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| word == TEMPLATE_PARAMETER)
}

/// Frees memory that the guests of the template do not need, and moves what is left together. Best effort.
pub fn shrink() {
    for (path, value) in [("/proc/sys/vm/drop_caches", "3"), ("/proc/sys/vm/compact_memory", "1")] {
        if let Err(error) = fs::write(path, value) {
            tracing::warn!("failed to write {path}: {error}");
        }
    }
}

/// Runs a container when the process that makes the template opens a connection, which is closed at once. Then writes
/// the mark at which the VM is saved. After an error, the guest ends, because a part of the container may remain.
pub async fn prepare(port: vsock::Listener, tasks: Arc<Tasks>) {
    if let Err(error) = port.accept().await {
        fatal::die(&format!("failed to wait for the begin of the trial: {error}"));
    }
    drop(port);
    if let Err(error) = trial::run(&tasks).await {
        fatal::die(&chain(&error));
    }
    boot_mark::write(BootMark::TemplateReady);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_is_a_whole_word() {
        assert!(has_parameter("quiet husk.template=1\n") && has_parameter("husk.template=1 panic=-1"));
        assert!(!has_parameter("quiet") && !has_parameter("husk.template=10"));
    }
}
