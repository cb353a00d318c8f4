//! The VMM's end of the control socket: sends answers and notices to the shim, and ends the process with a reason.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use husk_base::sys::process::exit_immediately;
use nix::time::ClockId;

use crate::control::{Answer, BootStep, ExitReason, Notice, Reply, Request, wire};
use crate::serial::Console;

/// Sends answers and notices to the shim, from any thread of the process.
pub struct Reporter {
    control: OwnedFd,
    console: OnceLock<Arc<Console>>,
    ending: AtomicBool,
    /// The boot steps that were reported, one bit for each.
    reported: AtomicU32,
}

impl Reporter {
    /// Creates the reporter for a control socket.
    pub fn new(control: OwnedFd) -> Self {
        Self { control, console: OnceLock::new(), ending: AtomicBool::new(false), reported: AtomicU32::new(0) }
    }

    /// Receives the shim's next request.
    pub(crate) fn receive(&self) -> io::Result<(Request, Vec<OwnedFd>)> {
        wire::recv(&self.control)
    }

    /// Reports a boot step, unless the step was reported before. A guest can repeat its boot marks without bound, and
    /// these repetitions must not cause further notices.
    pub fn report_boot_step(&self, step: BootStep) {
        let bit = 1 << step as u32;
        if self.reported.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        self.send(&Reply::Notice(Notice::BootStep { step, at_ns: monotonic_ns() }), None);
    }

    /// Reports that the VMM is close to its fd limit.
    pub(crate) fn report_fd_shortage(&self) {
        self.send(&Reply::Notice(Notice::FdShortage), None);
    }

    /// Requests vhost-net for the interface with this MAC address.
    pub(crate) fn request_vhost(&self, mac: [u8; 6]) {
        self.send(&Reply::Notice(Notice::VhostRequested { mac }), None);
    }

    /// Reports why the VM has ended, and ends the process.
    pub fn exit(&self, reason: ExitReason) -> ! {
        if self.ending.swap(true, Ordering::SeqCst) {
            // Another thread is already ending the process. Only the first reason is reported.
            loop {
                std::thread::park();
            }
        }
        if let Some(console) = self.console.get() {
            console.flush();
        }
        let code = i32::from(matches!(reason, ExitReason::Failed(_)));
        self.send(&Reply::Notice(Notice::Exited { reason }), None);
        exit_immediately(code)
    }

    /// Registers the console, whose buffered output is written when the process ends.
    pub(crate) fn flush_at_exit(&self, console: Arc<Console>) {
        // The cell is empty, because the VM is built only once.
        let _ = self.console.set(console);
    }

    /// Answers a request, with an fd if the answer has one.
    pub(crate) fn answer(&self, seq: u64, result: Result<Answer, String>, fd: Option<&OwnedFd>) {
        self.send(&Reply::Answer { seq, result }, fd);
    }

    fn send(&self, reply: &Reply, fd: Option<&OwnedFd>) {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = wire::send(&self.control, reply, &fds) {
            // The shim has ended. Therefore, the VM is no longer needed.
            log::debug!("failed to send on the control socket: {error}");
            exit_immediately(0);
        }
    }
}

/// Reads CLOCK_MONOTONIC, which is the same clock in the shim and in the VMM.
fn monotonic_ns() -> u64 {
    // The call does not fail, because CLOCK_MONOTONIC always exists.
    let now = ClockId::CLOCK_MONOTONIC.now().map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn each_boot_step_is_reported_once() {
        let (control, shim) = wire::pair().unwrap();
        let reporter = Reporter::new(control);
        for _ in 0..100 {
            reporter.report_boot_step(BootStep::AgentReady);
            reporter.report_boot_step(BootStep::AgentStarted);
        }
        drop(reporter);
        let mut steps = Vec::new();
        while let Ok((Reply::Notice(Notice::BootStep { step, .. }), _)) = wire::recv::<Reply>(&shim) {
            steps.push(step);
        }
        assert_eq!(steps, [BootStep::AgentReady, BootStep::AgentStarted]);
    }
}
