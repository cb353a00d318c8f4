//! Handles the VMM's notices: the progress of the boot, signals to the VMM, and the reason why the VM ended.

use std::process::ExitStatus;
use std::sync::Arc;

use husk_vmm::control::{BootStep, ExitReason, Notice};
use tokio::sync::{Notify, mpsc, watch};

use crate::sandbox::timeline::Timeline;
use crate::text::bounded;

/// Maximum length of the VMM's text in a reason, in bytes. The VMM is not trusted.
const MAX_REASON: usize = 1024;

/// What the VMM's notices have reported so far.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Whether the agent listens for connections.
    pub ready: bool,
    /// Why the VM ended, if the VMM has reported the reason.
    pub reason: Option<String>,
    /// Whether no further notice can arrive, because the VMM has closed the control socket.
    pub closed: bool,
}

impl Progress {
    /// Returns whether the VM has ended.
    pub fn ended(&self) -> bool {
        self.reason.is_some() || self.closed
    }
}

/// Adds the boot steps from the VMM's notices to the timeline. Notifies `terminated` if the VMM reports SIGTERM or
/// SIGINT. Returns what the notices report.
pub fn watch(
    mut notices: mpsc::Receiver<Notice>,
    timeline: Arc<Timeline>,
    terminated: Arc<Notify>,
) -> watch::Receiver<Progress> {
    let (update, progress) = watch::channel(Progress::default());
    let task = async move {
        while let Some(notice) = notices.recv().await {
            match notice {
                Notice::BootStep { step, at_ns } => {
                    timeline.mark_at(name(step), at_ns);
                    if step == BootStep::AgentReady {
                        update.send_modify(|p| p.ready = true);
                    }
                }
                Notice::Terminated => terminated.notify_one(),
                // `Vmm` handles these notices itself.
                Notice::FdShortage | Notice::VhostRequested { .. } => {}
                Notice::Exited { reason } => {
                    let reason = text(&reason);
                    // This notice means that the VM ended unexpectedly. If the shim ends a VM, the shim kills the VMM
                    // with SIGKILL, and the VMM sends no notice.
                    tracing::warn!(reason, "the guest ended");
                    update.send_modify(|p| p.reason = p.reason.take().or(Some(reason)));
                }
            }
        }
        // The notices end when the VMM process ends. The VMM may have ended without an `Exited` notice.
        update.send_modify(|p| p.closed = true);
    };
    tokio::spawn(task);
    progress
}

/// Waits until no further notice can arrive. Returns why the VM ended. `status` is the exit status of the VMM process,
/// which has ended. `killed` says why the shim killed the VMM process, if the shim did.
pub async fn end_reason(progress: &mut watch::Receiver<Progress>, status: ExitStatus, killed: Option<&str>) -> String {
    let reported = match progress.wait_for(|p| p.closed).await {
        Ok(last) => last.reason.clone(),
        // The task in `watch` has panicked.
        Err(_) => None,
    };
    // If the VM ends by itself, the shim loses the connection to the agent, and kills a VMM that is about to end.
    // Therefore the VMM's own reason has priority.
    reported.unwrap_or_else(|| match killed {
        Some(killed) => killed.to_owned(),
        None => format!("the VMM process ended with {status}"),
    })
}

fn text(reason: &ExitReason) -> String {
    match reason {
        ExitReason::Reset => "the guest reset itself or powered off".to_owned(),
        ExitReason::Stopped => "the VM was stopped".to_owned(),
        ExitReason::Failed(why) => format!("the VM failed: {}", bounded(why, MAX_REASON)),
    }
}

fn name(step: BootStep) -> &'static str {
    match step {
        BootStep::ProcessStarted => "vmm process",
        BootStep::VmCreated => "vm created",
        BootStep::FirstInstruction => "first guest instruction",
        BootStep::AgentStarted => "agent started",
        BootStep::AgentReady => "agent ready",
        BootStep::TemplateReady => "template ready",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    /// Returns the reason after `notices` and the end of the VMM process with SIGKILL.
    async fn reason_after(notices: Vec<Notice>, killed: Option<&str>) -> String {
        let (sender, receiver) = mpsc::channel(1);
        let timeline = Arc::new(Timeline::new("ns", "s", std::path::PathBuf::new()));
        let mut progress = watch(receiver, timeline, Arc::default());
        for notice in notices {
            sender.send(notice).await.unwrap();
        }
        drop(sender);
        end_reason(&mut progress, ExitStatus::from_raw(libc::SIGKILL), killed).await
    }

    fn failed(why: &str) -> Notice {
        Notice::Exited { reason: ExitReason::Failed(why.to_owned()) }
    }

    #[tokio::test]
    async fn reason_is_the_first_one_that_the_vmm_reported() {
        let notices = vec![failed("thread vcpu0 made system call 41"), failed("another reason")];
        let expected = "the VM failed: thread vcpu0 made system call 41";
        assert_eq!(reason_after(notices, Some("the shim killed it")).await, expected);
    }

    #[tokio::test]
    async fn reason_has_a_maximum_length_and_no_control_characters() {
        let reason = reason_after(vec![failed(&"\x1b".repeat(100_000))], None).await;
        assert!(
            reason.len() < 4 * MAX_REASON && !reason.contains('\x1b'),
            "the reason has {} bytes, or contains an escape character",
            reason.len()
        );
    }

    #[tokio::test]
    async fn reason_names_kill_or_exit_status_if_the_vmm_reported_none() {
        assert_eq!(reason_after(Vec::new(), Some("the shim killed it")).await, "the shim killed it");
        assert_eq!(reason_after(Vec::new(), None).await, "the VMM process ended with signal: 9 (SIGKILL)");
    }
}
