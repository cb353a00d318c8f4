//! Prepares a guest that becomes a template: a saved guest from which other guests are made.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

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

/// Time between two reports of free pages while the template is made, and afterwards, in milliseconds. A report has at
/// most 32 blocks of each size. The second value is the kernel's default.
const REPORT_DELAYS: [&str; 2] = ["20", "2000"];
/// Kernel parameter with the time between two reports (guest/kernel/patches/0020-page-reporting-delay.patch).
const REPORT_DELAY: &str = "/sys/module/page_reporting/parameters/page_reporting_delay_ms";
/// How long the guest waits until its kernel has reported the pages that the boot has freed. The first report comes up to
/// two seconds after a page was freed.
const BOOT_REPORTING: Duration = Duration::from_millis(2500);
/// The same for the pages that the trial has freed. Then the first of [`REPORT_DELAYS`] counts.
const TRIAL_REPORTING: Duration = Duration::from_secs(1);

/// Frees memory that the guests of the template do not need, and moves what is left together. Waits until the kernel has
/// reported the free pages, which then need not be saved. Best effort.
pub async fn shrink() {
    let [fast, _] = REPORT_DELAYS;
    let writes = [(REPORT_DELAY, fast), ("/proc/sys/vm/drop_caches", "3"), ("/proc/sys/vm/compact_memory", "1")];
    for (path, value) in writes {
        write(path, value);
    }
    tokio::time::sleep(BOOT_REPORTING).await;
}

fn write(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        tracing::warn!("failed to write {path}: {error}");
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
    // Otherwise, each guest of the template would report at its start what the trial has freed. For each reported block,
    // the kernel reads its page metadata.
    tokio::time::sleep(TRIAL_REPORTING).await;
    let [_, usual] = REPORT_DELAYS;
    write(REPORT_DELAY, usual);
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
