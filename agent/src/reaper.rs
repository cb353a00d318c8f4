//! The reaper: collects all exited children and calls the callback of each PID exactly once. The order of the calls is
//! the order in which the kernel reports the exits.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use husk_base::sync::lock;
use husk_base::sys::process::wait;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// Exit code, or 128 + signal number. The range is 0 to 255.
    pub status: u32,
    /// Exit time, in nanoseconds since the epoch.
    pub at_ns: i64,
}

type Callback = Box<dyn FnOnce(ProcessExit) + Send>;

#[derive(Default)]
struct Inner {
    claimed: HashMap<i32, Callback>,
    /// Exits of PIDs that no caller has claimed yet. Kept only while an [`UnclaimedExitsGuard`] lives.
    unclaimed: HashMap<i32, ProcessExit>,
    guards: usize,
}

/// Handle to the reaper. Clones share the same state.
#[derive(Clone, Default)]
pub struct Reaper {
    inner: Arc<Mutex<Inner>>,
}

/// While a guard lives, the reaper keeps the exits of unclaimed processes. The agent must take a guard before it spawns
/// a helper, because the helper's child may exit before the agent knows the child's PID.
pub struct UnclaimedExitsGuard(Reaper);

impl Drop for UnclaimedExitsGuard {
    fn drop(&mut self) {
        self.0.with(|inner| {
            inner.guards = inner.guards.saturating_sub(1);
            if inner.guards == 0 {
                inner.unclaimed.clear();
            }
        });
    }
}

impl Reaper {
    /// Subscribes to SIGCHLD.
    pub fn signals(&self) -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Starts to keep the exits of unclaimed processes. See [`UnclaimedExitsGuard`].
    pub fn keep_unclaimed_exits(&self) -> UnclaimedExitsGuard {
        self.with(|inner| inner.guards += 1);
        UnclaimedExitsGuard(self.clone())
    }

    /// Calls `callback` when `pid` exits. If `pid` has already exited, calls `callback` at once. The caller must hold
    /// an [`UnclaimedExitsGuard`].
    pub fn on_exit(&self, pid: i32, callback: impl FnOnce(ProcessExit) + Send + 'static) {
        let ready = self.with(|inner| match inner.unclaimed.remove(&pid) {
            Some(exit) => Some((exit, Box::new(callback) as Callback)),
            None => {
                inner.claimed.insert(pid, Box::new(callback));
                None
            }
        });
        if let Some((exit, callback)) = ready {
            callback(exit);
        }
    }

    /// Forgets the exit of an earlier process with the PID `pid`. The caller knows that the process that has this PID
    /// now has not been reaped. While a start hangs, its guard keeps exits for long, and PIDs are reused.
    pub fn forget_earlier_exit(&self, pid: i32) {
        self.with(|inner| inner.unclaimed.remove(&pid));
    }

    /// Waits for the exit of `pid`.
    pub async fn wait(&self, pid: i32) -> Option<ProcessExit> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.on_exit(pid, move |exit| {
            let _ = sender.send(exit);
        });
        receiver.await.ok()
    }

    /// Collects all exited children.
    pub fn reap(&self) {
        loop {
            match wait(-1, libc::WNOHANG | libc::__WALL) {
                Ok(None) | Err(nix::Error::ECHILD) => return,
                Ok(Some((pid, status))) => {
                    if let Some(status) = decode(status) {
                        self.record_exit(pid, ProcessExit { status, at_ns: now_ns() });
                    }
                }
                Err(error) => {
                    tracing::error!("failed to collect exited children: waitpid: {error}");
                    return;
                }
            }
        }
    }

    /// Stores the exit of `pid`, or calls its callback.
    pub(crate) fn record_exit(&self, pid: i32, exit: ProcessExit) {
        let callback = self.with(|inner| {
            let callback = inner.claimed.remove(&pid);
            if callback.is_none() && inner.guards > 0 {
                inner.unclaimed.insert(pid, exit);
            }
            callback
        });
        if let Some(callback) = callback {
            callback(exit);
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut lock(&self.inner))
    }
}

/// Returns the wall clock time in nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// Converts a wait(2) status to the exit status that runtimes report. Returns `None` if the process has not exited but
/// has stopped or continued.
fn decode(status: i32) -> Option<u32> {
    if libc::WIFEXITED(status) {
        Some(libc::WEXITSTATUS(status).cast_unsigned() & 0xff)
    } else if libc::WIFSIGNALED(status) {
        Some(128 + (libc::WTERMSIG(status).cast_unsigned() & 0x7f))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn decode_converts_exit_codes_and_signals() {
        assert_eq!(decode(3 << 8), Some(3));
        assert_eq!(decode(libc::SIGKILL), Some(137));
        assert_eq!(decode(40), Some(168));
        assert_eq!(decode(0x7f | libc::SIGSTOP << 8), None);
    }

    #[test]
    fn exit_of_an_earlier_process_with_the_same_pid_is_not_reported() {
        let (reaper, seen) = (Reaper::default(), Arc::new(AtomicU32::new(0)));
        let _guard_of_a_start_that_hangs = reaper.keep_unclaimed_exits();
        reaper.record_exit(42, ProcessExit { status: 7, at_ns: 1 });
        let count = seen.clone();
        reaper.forget_earlier_exit(42);
        reaper.on_exit(42, move |exit| count.store(exit.status, Ordering::Relaxed));
        assert_eq!(seen.load(Ordering::Relaxed), 0);
        reaper.record_exit(42, ProcessExit { status: 8, at_ns: 2 });
        assert_eq!(seen.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn on_exit_after_the_exit_calls_back_once() {
        let (reaper, seen) = (Reaper::default(), Arc::new(AtomicU32::new(0)));
        let guard = reaper.keep_unclaimed_exits();
        reaper.record_exit(42, ProcessExit { status: 7, at_ns: 1 });
        let count = seen.clone();
        reaper.on_exit(42, move |exit| {
            count.fetch_add(exit.status, Ordering::Relaxed);
        });
        reaper.record_exit(42, ProcessExit { status: 7, at_ns: 2 });
        drop(guard);
        assert_eq!(seen.load(Ordering::Relaxed), 7);
        reaper.record_exit(43, ProcessExit { status: 1, at_ns: 3 });
        reaper.with(|inner| assert!(inner.unclaimed.is_empty()));
    }
}
