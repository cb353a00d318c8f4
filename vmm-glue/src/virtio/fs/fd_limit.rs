//! Keeps the number of the VMM's open fds below the fd limit. The VMM holds an open fd for each file that the guest has
//! looked up and has not forgotten yet.
//!
//! The guest's kernel forgets files only when the guest runs low on memory. Therefore, when few fds are free, the VMM
//! asks the shim to make the guest forget files. Until fds are free again, requests that may open a file wait, but only
//! for a limited time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait_timeout};

use super::fd_budget::FdBudget;

/// While fds are not scarce, only every 64th call of [`FdLimit::wait_for_fd`] counts the open fds.
const CHECK_INTERVAL: u32 = 64;
/// Minimum time between two requests to the shim for the same kind of shortage.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time after which a request is repeated although the earlier ones freed nothing. The guest may have closed
/// files meanwhile, which it can forget now.
const MAX_REQUEST_INTERVAL: Duration = Duration::from_secs(64);
/// Maximum time that requests wait, counted from the time at which fds became scarce. After this time, requests proceed
/// although fds are scarce, and may fail.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A function that asks the shim to make the guest forget files.
pub type RequestForget = Box<dyn Fn() + Send + Sync>;

/// Watches the number of open fds.
pub struct FdLimit {
    /// The open directory /proc/self/fd.
    fd_directory: File,
    /// Fds are scarce if at least this number of fds are open.
    threshold: u64,
    /// The fds of temporary files.
    budget: Arc<FdBudget>,
    request_forget: RequestForget,
    /// Number of calls of [`FdLimit::wait_for_fd`].
    count: AtomicU32,
    all: Shortage,
    /// A shortage of fds for temporary files only. Other requests do not wait for its end.
    temporary: Shortage,
}

/// A shortage of one kind of fds.
#[derive(Default)]
struct Shortage {
    scarce: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Time at which fds became scarce.
    scarce_since: Option<Instant>,
    last_request: Option<Request>,
}

/// A request to the shim.
#[derive(Clone, Copy)]
struct Request {
    at: Instant,
    /// Number of fds that were open.
    open: u64,
    /// Time until the next request if this one frees nothing.
    interval: Duration,
}

impl FdLimit {
    /// Creates a watcher. While at least `threshold` fds are open, or `budget` is scarce, waiting requests call
    /// `request_forget`. They call it at most once per [`REQUEST_INTERVAL`], and more rarely if the earlier calls freed
    /// nothing. `fd_directory` is /proc/self/fd.
    pub fn new(fd_directory: File, threshold: u64, budget: Arc<FdBudget>, request_forget: RequestForget) -> Self {
        Self {
            fd_directory,
            threshold,
            budget,
            request_forget,
            count: AtomicU32::new(0),
            all: Shortage::default(),
            temporary: Shortage::default(),
        }
    }

    /// Waits while fds are scarce, but no longer than [`TIMEOUT`] after fds became scarce. A request that may open a
    /// file must call this function first.
    pub fn wait_for_fd(&self) {
        let check = self.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECK_INTERVAL);
        if check || self.all.is_scarce() {
            self.all.wait(|| self.open_if_scarce(), &self.request_forget);
        }
    }

    /// Waits as [`FdLimit::wait_for_fd`] does, and also while the fds of temporary files are scarce. A request that may
    /// open a temporary file must call this function first.
    pub fn wait_for_temporary(&self) {
        self.wait_for_fd();
        if self.temporary.is_scarce() || self.budget.open_if_scarce().is_some() {
            self.temporary.wait(|| self.budget.open_if_scarce(), &self.request_forget);
        }
    }

    /// Wakes the requests that wait for an fd. The caller calls this function after the guest has forgotten or closed
    /// files.
    pub fn released(&self) {
        self.all.wake();
        self.temporary.wake();
    }

    /// If fds are scarce, returns the number of open fds.
    fn open_if_scarce(&self) -> Option<u64> {
        // Since Linux 6.2, the size of /proc/self/fd is the number of open fds (proc_readfd_count() in fs/proc/fd.c).
        // On older kernels, this size is 0, and the number of a new fd is used instead. A new fd gets the lowest free
        // number, and therefore all lower numbers are in use.
        let count = self.fd_directory.metadata().map_or(0, |directory| directory.len());
        let lowest_free = self.fd_directory.try_clone().map_or(u64::MAX, |file| file.as_raw_fd().unsigned_abs().into());
        Some(count.max(lowest_free)).filter(|&open| open >= self.threshold)
    }
}

impl Shortage {
    fn is_scarce(&self) -> bool {
        self.scarce.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        if self.is_scarce() {
            // Take the lock before the notification. A thread that finds fds scarce holds the lock until it waits for
            // the notification. Therefore, the thread cannot miss the notification.
            drop(lock(&self.state));
            self.changed.notify_all();
        }
    }

    /// Waits while `open_if_scarce` returns a number of open fds.
    fn wait(&self, open_if_scarce: impl Fn() -> Option<u64>, request_forget: &RequestForget) {
        let mut state = lock(&self.state);
        loop {
            let Some(open) = open_if_scarce() else {
                state.scarce_since = None;
                self.scarce.store(false, Ordering::Relaxed);
                return;
            };
            self.scarce.store(true, Ordering::Relaxed);
            let waited = state.scarce_since.get_or_insert_with(Instant::now).elapsed();
            if state.begin_request(Instant::now(), open) {
                drop(state);
                request_forget();
                state = lock(&self.state);
                continue;
            }
            let Some(left) = TIMEOUT.checked_sub(waited).filter(|left| !left.is_zero()) else { return };
            (state, _) = wait_timeout(&self.changed, state, left.min(REQUEST_INTERVAL));
        }
    }
}

impl State {
    /// Returns whether to send a request to the shim, and records the request. Files that the guest has open cannot be
    /// forgotten. Therefore, the time between requests that free nothing doubles.
    fn begin_request(&mut self, now: Instant, open: u64) -> bool {
        let interval = match self.last_request {
            None => REQUEST_INTERVAL,
            Some(last) => {
                let freed = open < last.open;
                if now.duration_since(last.at) < if freed { REQUEST_INTERVAL } else { last.interval } {
                    return false;
                }
                if freed { REQUEST_INTERVAL } else { (last.interval * 2).min(MAX_REQUEST_INTERVAL) }
            }
        };
        self.last_request = Some(Request { at: now, open, interval });
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn fd_directory() -> File {
        File::open("/proc/self/fd").unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "the fds in /proc are those of the interpreter")]
    fn request_waits_until_fds_are_released() {
        let open = || File::open("/dev/null").unwrap();
        // Open 600 fds, which is more than the threshold of 500. After these fds are closed, fewer than 500 fds are
        // open, including the fds of other tests.
        let held: Vec<File> = std::iter::repeat_with(open).take(600).collect();
        let (requests, requested) = channel();
        let limit =
            Arc::new(FdLimit::new(fd_directory(), 500, FdBudget::new(8), Box::new(move || requests.send(()).unwrap())));
        let waiting = std::thread::spawn({
            let limit = Arc::clone(&limit);
            move || limit.wait_for_fd()
        });
        requested.recv().unwrap();
        assert!(!waiting.is_finished());
        drop(held);
        limit.released();
        waiting.join().unwrap();
        limit.wait_for_fd();
        assert!(requested.try_recv().is_err() && !limit.all.is_scarce());
    }

    #[test]
    #[cfg_attr(miri, ignore = "the fds in /proc are those of the interpreter")]
    fn request_proceeds_after_the_timeout() {
        let (requests, requested) = channel();
        let limit = FdLimit::new(fd_directory(), 0, FdBudget::new(8), Box::new(move || requests.send(()).unwrap()));
        let began = Instant::now();
        limit.wait_for_fd();
        assert!(began.elapsed() >= TIMEOUT && requested.try_iter().count() > 1);
        // The next request does not wait. The timeout is counted from the time at which fds became scarce, and has
        // already passed.
        let began = Instant::now();
        limit.wait_for_fd();
        assert!(began.elapsed() < REQUEST_INTERVAL);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the fds in /proc are those of the interpreter")]
    fn scarce_budget_stops_only_requests_for_temporary_files() {
        let budget = FdBudget::new(1);
        let held = budget.count(File::open("/dev/null").unwrap()).unwrap();
        let (requests, requested) = channel();
        let request = Box::new(move || requests.send(()).unwrap());
        let limit = Arc::new(FdLimit::new(fd_directory(), u64::MAX, budget, request));
        limit.wait_for_fd();
        assert!(requested.try_recv().is_err());
        let waiting = std::thread::spawn({
            let limit = Arc::clone(&limit);
            move || limit.wait_for_temporary()
        });
        requested.recv().unwrap();
        limit.wait_for_fd();
        drop(held);
        limit.released();
        waiting.join().unwrap();
        limit.wait_for_temporary();
        assert!(!limit.temporary.is_scarce());
    }

    #[test]
    fn requests_become_rarer_while_they_free_nothing() {
        let (mut state, began) = (State::default(), Instant::now());
        let seconds = |state: &mut State, from: u64, open: u64| -> Vec<u64> {
            let due = |&at: &u64| state.begin_request(began + Duration::from_secs(at), open);
            (from..from + 300).filter(due).collect()
        };
        assert_eq!(seconds(&mut state, 0, 28), [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]);
        // A request that freed files is repeated soon.
        assert_eq!(seconds(&mut state, 300, 27)[..3], [300, 301, 303]);
    }
}
