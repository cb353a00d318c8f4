//! Keeps the number of open fds below the process's fd limit, because each file that the guest knows is open in the
//! VMM.
//!
//! The guest's kernel forgets files only when the guest runs low on memory. Therefore, when few fds are free, the VMM
//! asks the shim to make the guest forget files. Requests that may open a file then wait for a limited time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait_timeout};
/// Number of requests between two checks of the number of open fds.
const CHECK_INTERVAL: u32 = 64;
/// Minimum time between two requests to the shim.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time that requests wait after fds became scarce. After this time, the requests proceed, and may fail.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the shim to make the guest forget files.
pub type RequestForget = Box<dyn Fn() + Send + Sync>;

/// Watches the number of open fds.
pub struct FdLimit {
    /// The open directory /proc/self/fd.
    fd_directory: File,
    /// Fds are scarce if this number of fds, or more, are open.
    threshold: u64,
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
    /// Creates a watcher. While `threshold` or more fds are open and requests wait, the watcher calls `request_forget`
    /// repeatedly. `fd_directory` is /proc/self/fd.
    pub fn new(fd_directory: File, threshold: u64, request_forget: RequestForget) -> Self {
        Self {
            fd_directory,
            threshold,
            request_forget,
            count: AtomicU32::new(0),
            scarce: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Called before a request that may open a file. While fds are scarce, waits at most until [`TIMEOUT`].
    pub fn wait_for_fd(&self) {
        let check = self.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECK_INTERVAL);
        if check || self.scarce.load(Ordering::Relaxed) {
            self.wait();
        }
    }

    /// Called after files were forgotten. Wakes the requests that wait.
    pub fn released(&self) {
        if self.scarce.load(Ordering::Relaxed) {
            // A waiting thread holds the lock while it counts fds. Therefore, after this line, the thread either sees
            // that fds were released, or already waits for the notification.
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
        // On older kernels, use the number of a new fd. A new fd gets the lowest free number, and therefore all lower
        // numbers are in use.
        let count = self.fd_directory.metadata().map_or(0, |directory| directory.len());
        let lowest_free = self.fd_directory.try_clone().map_or(u64::MAX, |file| file.as_raw_fd().unsigned_abs().into());
        count.max(lowest_free) < self.threshold
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    fn fd_directory() -> File {
        File::open("/proc/self/fd").unwrap()
    }

    #[test]
    fn request_waits_until_fds_are_released() {
        let open = || File::open("/dev/null").unwrap();
        // Open so many fds that the lowest free fd is above the threshold, even if other tests have fds open.
        let held: Vec<File> = std::iter::repeat_with(open).take(600).collect();
        let (requests, requested) = channel();
        let limit = Arc::new(FdLimit::new(fd_directory(), 500, Box::new(move || requests.send(()).unwrap())));
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
    fn request_proceeds_after_the_timeout() {
        let (requests, requested) = channel();
        let limit = FdLimit::new(fd_directory(), 0, Box::new(move || requests.send(()).unwrap()));
        let began = Instant::now();
        limit.wait_for_fd();
        assert!(began.elapsed() >= TIMEOUT && requested.try_iter().count() > 1);
        // The next request does not wait again, because the timeout starts when fds become scarce.
        let began = Instant::now();
        limit.wait_for_fd();
        assert!(began.elapsed() < REQUEST_INTERVAL);
    }
}
