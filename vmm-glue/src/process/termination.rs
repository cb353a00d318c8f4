//! Waits for requests on the control socket, and for SIGTERM and SIGINT.
//!
//! The VMM cannot end the guest in an orderly way, because the guest has no power button. Only the shim can send
//! signals to containers and tell the guest to write its dirty pages. Therefore, the VMM tells the shim about the
//! signal, and serves the shim's requests until the shim kills it. The VMM does not flush its disks itself. What the
//! guest has written to a disk is in the node's page cache, which outlives the VMM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::reporter::Reporter;

/// How long the shim may take to end the pod after SIGTERM or SIGINT. A shim that works needs less time, even if the
/// guest hangs. systemd sends SIGKILL after 90 s.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the signals that end the pod. They are blocked in all threads, and are read from a signalfd. A handler would
/// interrupt system calls of all kinds of threads. Without a handler, the kernel would ignore the signals, because the
/// VMM is the first process of its PID namespace (pid_namespaces(7)).
pub fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// The sources of the control thread's work.
pub struct Inbox {
    epoll: Epoll,
    signals: SignalFd,
    /// When the process ends if the shim has not killed it before.
    deadline: Option<Instant>,
    timeout: Duration,
}

impl Inbox {
    /// Watches the control socket and the signals. [`signals`] must be blocked.
    pub fn new(control: BorrowedFd<'_>) -> io::Result<Self> {
        Self::with_timeout(control, END_TIMEOUT)
    }

    fn with_timeout(control: BorrowedFd<'_>, timeout: Duration) -> io::Result<Self> {
        let signals = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        for fd in [control.as_raw_fd(), signals.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd.cast_unsigned().into()))?;
        }
        Ok(Self { epoll, signals, deadline: None, timeout })
    }

    /// Waits until the control socket is readable or closed. If a signal arrives, tells the shim.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if the shim has not ended this process in time after a signal.
    pub fn wait(&mut self, reporter: &Reporter) -> io::Result<()> {
        while !self.next(reporter)? {}
        Ok(())
    }

    /// Waits for one event. Returns whether the control socket is readable or closed.
    fn next(&mut self, reporter: &Reporter) -> io::Result<bool> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let limit = self.timeout.as_secs();
            let text = format!("the shim did not end the pod within {limit} s after SIGTERM");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        // Round up, so that the deadline has passed after the wait.
        let wait_ms = left.map_or(-1, |left| i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1));
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(wait_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            result => result?,
        };
        let signals = u64::from(self.signals.as_raw_fd().cast_unsigned());
        let mut readable = false;
        for event in events.iter().take(count) {
            if event.data() != signals {
                readable = true;
            } else if self.take_signals()? && self.deadline.is_none() {
                log::info!("SIGTERM or SIGINT: the shim has to end the pod");
                self.deadline = Some(Instant::now() + self.timeout);
                reporter.report_termination();
            }
        }
        Ok(readable)
    }

    /// Reads all pending signals. Returns whether there was one.
    fn take_signals(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match self.signals.read_signal() {
                Ok(Some(_)) => any = true,
                Ok(None) => return Ok(any),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::signal::raise;

    use super::*;
    use crate::control::{Call, Notice, Reply, Request, wire};

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no signalfd")]
    fn signal_is_reported_once_and_the_wait_for_the_shim_is_limited() {
        // `raise` signals only this thread.
        signals().thread_block().unwrap();
        let (control, shim) = wire::pair().unwrap();
        let timeout = Duration::from_millis(300);
        let mut inbox = Inbox::with_timeout(control.as_fd(), timeout).unwrap();
        let reporter = Reporter::new(control);
        wire::send(&shim, &Request { seq: 1, call: Call::Pause }, &[]).unwrap();
        inbox.wait(&reporter).unwrap();
        assert_eq!(reporter.receive().unwrap().0.seq, 1);
        raise(Signal::SIGTERM).unwrap();
        assert!(!inbox.next(&reporter).unwrap());
        let begin = Instant::now();
        raise(Signal::SIGINT).unwrap();
        assert!(!inbox.next(&reporter).unwrap());
        // The shim's requests are served until the deadline.
        wire::send(&shim, &Request { seq: 2, call: Call::Pause }, &[]).unwrap();
        inbox.wait(&reporter).unwrap();
        assert_eq!(reporter.receive().unwrap().0.seq, 2);
        let error = inbox.wait(&reporter).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() + Duration::from_millis(50) >= timeout, "{:?}", begin.elapsed());
        drop(reporter);
        let (notice, _) = wire::recv::<Reply>(&shim).unwrap();
        assert!(matches!(notice, Reply::Notice(Notice::Terminated)), "{notice:?}");
        assert!(wire::recv::<Reply>(&shim).is_err());
    }
}
