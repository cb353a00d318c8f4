//! A program that the launcher has started.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use husk_base::async_fd::register;
use husk_base::sys::{pidfd, process};
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::LaunchError;
use crate::blocking;

/// A program, which is a child of the shim.
#[derive(Debug)]
pub struct Program {
    child: Arc<Child>,
    kill_on_drop: bool,
}

#[derive(Debug)]
struct Child {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    reaped: AtomicBool,
}

impl Program {
    /// Returns a program that gets SIGKILL when it is dropped.
    pub(super) fn new(pid: i32, mut fds: Vec<OwnedFd>) -> Result<Self, LaunchError> {
        // The pidfd is missing if this process has no free fd.
        let pidfd = fds.pop().ok_or_else(|| nix::Error::EMFILE.into());
        let pidfd = pidfd.and_then(|pidfd| register(pidfd, Interest::READABLE)).map_err(|error| {
            drop(blocking::spawn(move || kill_and_reap(pid)));
            LaunchError::Receive(error)
        })?;
        Ok(Self { child: Arc::new(Child { pid, pidfd, reaped: AtomicBool::new(false) }), kill_on_drop: true })
    }

    /// Sets whether the program gets SIGKILL when it is dropped.
    pub(super) fn with_kill_on_drop(mut self, kill_on_drop: bool) -> Self {
        self.kill_on_drop = kill_on_drop;
        self
    }

    /// Returns the PID. After [`Program::wait`] has returned, the PID may belong to another process.
    pub fn pid(&self) -> i32 {
        self.child.pid
    }

    /// Sends a signal, unless the program has ended.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd::send_signal(self.child.pidfd.get_ref().as_fd(), signal as i32);
    }

    /// Waits until the program has ended, but does not reap the program.
    pub async fn ended(&self) {
        let _ = self.child.pidfd.readable().await;
    }

    /// Waits until the program has ended, and returns its status.
    ///
    /// # Errors
    /// ECHILD if an earlier call has reaped the program. Otherwise, the error of waiting.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }
}

/// Ends a child of this process that has no [`Program`]. Blocks the calling thread until the child has ended.
pub(super) fn kill_and_reap(pid: i32) {
    // The PID cannot belong to another process, because nothing else reaps this child.
    let _ = process::kill(pid, Signal::SIGKILL as i32);
    let _ = process::wait(pid, 0);
}

impl Child {
    async fn wait(&self) -> io::Result<ExitStatus> {
        self.pidfd.readable().await?.retain_ready();
        // After the program is reaped, the PID may belong to another child.
        if self.reaped.swap(true, Ordering::Relaxed) {
            return Err(nix::Error::ECHILD.into());
        }
        // This call does not block, because the program has ended.
        let (_, status) = process::wait(self.pid, 0)?.unwrap_or_default();
        Ok(ExitStatus::from_raw(status))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.child.reaped.load(Ordering::Relaxed) {
            return;
        }
        if self.kill_on_drop {
            self.signal(Signal::SIGKILL);
        }
        // If there is no async runtime, the shim is about to end. After its end, init reaps the program.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let child = Arc::clone(&self.child);
            runtime.spawn(async move { child.wait().await });
        }
    }
}
