//! The reaper: collects every ended child, tells whoever claimed it, exactly once and in the order of the kernel.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0 to 255: the exit code, or 128 + the signal's number.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_ns: i64,
}

type Callback = Box<dyn FnOnce(Ended) + Send>;

#[derive(Default)]
struct Inner {
    claimed: HashMap<i32, Callback>,
    /// Ended before anybody knew whose they are; kept only while somebody is about to learn a pid.
    unclaimed: HashMap<i32, Ended>,
    expecting: usize,
}

/// The handle to the reaper; cloning it clones the handle.
#[derive(Clone, Default)]
pub struct Reaper {
    inner: Arc<Mutex<Inner>>,
}

/// While one of these lives, ends of unknown processes are remembered. Take it before a helper is spawned.
pub struct Expecting(Reaper);

impl Drop for Expecting {
    fn drop(&mut self) {
        self.0.with(|inner| {
            inner.expecting = inner.expecting.saturating_sub(1);
            if inner.expecting == 0 {
                inner.unclaimed.clear();
            }
        });
    }
}

impl Reaper {
    /// The executor's notice that children ended.
    ///
    /// # Errors
    /// When the handler cannot be installed.
    pub fn signals(&self) -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// See [`Expecting`].
    pub fn expect(&self) -> Expecting {
        self.with(|inner| inner.expecting += 1);
        Expecting(self.clone())
    }

    /// Calls `callback` when `pid` has ended, at once if it already has. The caller holds an [`Expecting`].
    pub fn claim(&self, pid: i32, callback: impl FnOnce(Ended) + Send + 'static) {
        let ready = self.with(|inner| match inner.unclaimed.remove(&pid) {
            Some(ended) => Some((ended, Box::new(callback) as Callback)),
            None => {
                inner.claimed.insert(pid, Box::new(callback));
                None
            }
        });
        if let Some((ended, callback)) = ready {
            callback(ended);
        }
    }

    /// Waits for `pid`.
    pub async fn wait(&self, pid: i32) -> Option<Ended> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.claim(pid, move |ended| {
            let _ = sender.send(ended);
        });
        receiver.await.ok()
    }

    /// Collects all children that have ended.
    pub fn reap(&self) {
        loop {
            let mut status = 0;
            // SAFETY: the status is a live integer; -1 asks for any child. The raw call, because a typed one refuses
            // real-time signals after it has taken the child's status.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
            match pid {
                0 => return,
                1.. => {
                    if let Some(status) = decode(status) {
                        self.ended(pid, Ended { status, at_ns: now_ns() });
                    }
                }
                _ => match nix::Error::last() {
                    nix::Error::EINTR => {}
                    nix::Error::ECHILD => return,
                    error => {
                        tracing::error!("waitpid: {error}");
                        return;
                    }
                },
            }
        }
    }

    fn ended(&self, pid: i32, ended: Ended) {
        let callback = self.with(|inner| {
            let callback = inner.claimed.remove(&pid);
            if callback.is_none() && inner.expecting > 0 {
                inner.unclaimed.insert(pid, ended);
            }
            callback
        });
        if let Some(callback) = callback {
            callback(ended);
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The wall clock in nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// The status of wait(2) as runtimes report it; `None` for a process that is stopped or continued, not ended.
fn decode(status: i32) -> Option<u32> {
    if libc::WIFEXITED(status) {
        Some((libc::WEXITSTATUS(status) & 0xff) as u32)
    } else if libc::WIFSIGNALED(status) {
        Some(128 + (libc::WTERMSIG(status) & 0x7f) as u32)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn statuses() {
        assert_eq!(decode(3 << 8), Some(3));
        assert_eq!(decode(libc::SIGKILL), Some(137));
        assert_eq!(decode(40), Some(168));
        assert_eq!(decode(0x7f | libc::SIGSTOP << 8), None);
    }

    #[test]
    fn an_end_before_the_claim_is_delivered_once() {
        let (reaper, seen) = (Reaper::default(), Arc::new(AtomicU32::new(0)));
        let guard = reaper.expect();
        reaper.ended(42, Ended { status: 7, at_ns: 1 });
        let count = seen.clone();
        reaper.claim(42, move |ended| {
            count.fetch_add(ended.status, Ordering::Relaxed);
        });
        reaper.ended(42, Ended { status: 7, at_ns: 2 });
        drop(guard);
        assert_eq!(seen.load(Ordering::Relaxed), 7);
        reaper.ended(43, Ended { status: 1, at_ns: 3 });
        reaper.with(|inner| assert!(inner.unclaimed.is_empty()));
    }
}
