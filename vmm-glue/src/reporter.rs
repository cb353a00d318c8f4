//! The VMM's end of the control socket: sends answers and notices to the shim, and ends the process with a reason.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

    /// Receives the shim's next request whose fds are complete. If fds of a request are missing, answers this request
    /// with an error. A guest that has many files open can make the VMM reach its fd limit.
    pub(crate) fn receive(&self) -> io::Result<(Request, Vec<OwnedFd>)> {
        loop {
            let (request, fds) = wire::receive(&self.control)?.decode::<Request>()?;
            match fds {
                Ok(fds) => return Ok((request, fds)),
                Err(lost) => self.answer(request.seq, Err(lost.to_string())),
            }
        }
    }

    /// Reports a boot step, unless the step was reported before. A guest can repeat its boot marks without bound, and
    /// these repetitions must not cause further notices.
    pub fn report_boot_step(&self, step: BootStep) {
        let bit = 1 << step as u32;
        if self.reported.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        self.send(&Reply::Notice(Notice::BootStep { step, at_ns: monotonic_ns() }));
    }

    /// Reports that the VMM is close to its fd limit.
    pub(crate) fn report_fd_shortage(&self) {
        self.send(&Reply::Notice(Notice::FdShortage));
    }

    /// Reports that the process has received SIGTERM or SIGINT.
    pub(crate) fn report_termination(&self) {
        self.send(&Reply::Notice(Notice::Terminated));
    }

    /// Returns the control socket, to wait for requests.
    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Requests vhost-net for the interface with this MAC address.
    pub(crate) fn request_vhost(&self, mac: [u8; 6]) {
        self.send(&Reply::Notice(Notice::VhostRequested { mac }));
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
        self.send(&Reply::Notice(Notice::Exited { reason }));
        exit_immediately(code)
    }

    /// Registers the console, whose buffered output is written when the process ends.
    pub(crate) fn flush_at_exit(&self, console: Arc<Console>) {
        // The cell is empty, because the VM is built only once.
        let _ = self.console.set(console);
    }

    /// Answers a request.
    pub(crate) fn answer(&self, seq: u64, result: Result<Answer, String>) {
        self.send(&Reply::Answer { seq, result });
    }

    fn send(&self, reply: &Reply) {
        if let Err(error) = wire::send(&self.control, reply, &[]) {
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
    use std::io::Read;

    use husk_base::sys::scm_rights;

    use super::*;
    use crate::control::Call;

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

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn request_whose_fds_are_lost_is_answered_with_an_error() {
        let (control, shim) = wire::pair().unwrap();
        let reporter = Reporter::new(control);
        let (mut reader, writer) = io::pipe().unwrap();
        let request = serde_json::to_vec(&Request { seq: 5, call: Call::Connect { port: 1 } }).unwrap();
        scm_rights::send(&shim, &request, &[writer.as_fd(); wire::MAX_FDS + 1]).unwrap();
        wire::send(&shim, &Request { seq: 6, call: Call::Pause }, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (next, fds) = reporter.receive().unwrap();
        assert_eq!((next.seq, fds.len()), (6, 1));
        let (answer, _) = wire::recv::<Reply>(&shim).unwrap();
        assert!(matches!(&answer, Reply::Answer { seq: 5, result: Err(e) } if e.contains("fd limit")), "{answer:?}");
        drop(fds);
        // The reader sees the end of the pipe only if every copy of the writer is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
