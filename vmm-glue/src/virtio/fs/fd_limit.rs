//! Keeps the number of the VMM's open fds below the fd limit. The VMM holds an open fd for each file that the guest has
//! looked up and has not forgotten yet.
//!
//! The guest's kernel forgets files only when the guest runs low on memory. Therefore, when few fds are free, the VMM
//! asks the shim to make the guest forget files. Until fds are free again, requests that may open a file wait, but only
//! for a limited time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait_timeout};

use super::fd_budget::FdBudget;

/// While fds are not scarce, only every 64th call of [`FdLimit::wait_for_fd`] counts the open fds.
const CHECK_INTERVAL: u32 = 64;
/// Minimum time between two requests to the shim.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
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
    /// Fds are also scarce if few of this budget are left.
    budget: Arc<FdBudget>,
    request_forget: RequestForget,
    /// Number of calls of [`FdLimit::wait_for_fd`].
    count: AtomicU32,
    scarce: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Time at which fds became scarce.
    scarce_since: Option<Instant>,
    last_request: Option<Instant>,
}

impl FdLimit {
    /// Creates a watcher. While at least `threshold` fds are open, or `budget` is scarce, and requests wait, the waiting requests call
    /// `request_forget` at most once per [`REQUEST_INTERVAL`]. `fd_directory` is /proc/self/fd.
    pub fn new(fd_directory: File, threshold: u64, budget: Arc<FdBudget>, request_forget: RequestForget) -> Self {
        Self {
            fd_directory,
            threshold,
            budget,
            request_forget,
            count: AtomicU32::new(0),
            scarce: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Waits while fds are scarce, but no longer than [`TIMEOUT`] after fds became scarce. A request that may open a
    /// file must call this function first.
    pub fn wait_for_fd(&self) {
        let check = self.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECK_INTERVAL);
        if check || self.scarce.load(Ordering::Relaxed) || self.budget.is_scarce() {
            self.wait();
        }
    }

    /// Wakes the requests that wait for an fd. The caller calls this function after the guest has forgotten files.
    pub fn released(&self) {
        if self.scarce.load(Ordering::Relaxed) {
            // Take the lock before the notification. A thread that finds the threshold reached holds the lock until
            // it waits for the notification. Therefore, the thread cannot miss the notification.
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    fn wait(&self) {
        let mut state = self.lock();
        loop {
            if self.is_below_threshold() {
                state.scarce_since = None;
                self.scarce.store(false, Ordering::Relaxed);
                return;
            }
            self.scarce.store(true, Ordering::Relaxed);
            let waited = state.scarce_since.get_or_insert_with(Instant::now).elapsed();
            if state.last_request.is_none_or(|last| last.elapsed() >= REQUEST_INTERVAL) {
                state.last_request = Some(Instant::now());
                drop(state);
                (self.request_forget)();
                state = self.lock();
                continue;
            }
            let Some(left) = TIMEOUT.checked_sub(waited).filter(|left| !left.is_zero()) else { return };
            (state, _) = wait_timeout(&self.changed, state, left.min(REQUEST_INTERVAL));
        }
    }

    fn is_below_threshold(&self) -> bool {
        // Since Linux 6.2, the size of /proc/self/fd is the number of open fds (proc_readfd_count() in fs/proc/fd.c).
        // On older kernels, this size is 0, and the number of a new fd is used instead. A new fd gets the lowest free
        // number, and therefore all lower numbers are in use.
        let count = self.fd_directory.metadata().map_or(0, |directory| directory.len());
        let lowest_free = self.fd_directory.try_clone().map_or(u64::MAX, |file| file.as_raw_fd().unsigned_abs().into());
        count.max(lowest_free) < self.threshold && !self.budget.is_scarce()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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
        assert!(requested.try_recv().is_err() && !limit.scarce.load(Ordering::Relaxed));
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
    fn request_waits_while_the_budget_is_scarce() {
        let budget = FdBudget::new(1);
        let held = budget.count(File::open("/dev/null").unwrap()).unwrap();
        let (requests, requested) = channel();
        let request = Box::new(move || requests.send(()).unwrap());
        let limit = Arc::new(FdLimit::new(fd_directory(), u64::MAX, budget, request));
        let waiting = std::thread::spawn({
            let limit = Arc::clone(&limit);
            move || limit.wait_for_fd()
        });
        requested.recv().unwrap();
        drop(held);
        limit.released();
        waiting.join().unwrap();
    }
}
