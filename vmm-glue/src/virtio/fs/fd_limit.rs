//! Room for the files that the guest knows of: each is open here, and a process can have only so many.
//!
//! The guest's kernel forgets files when it wants memory, of which it may have plenty. So where there is little room left,
//! the shim is asked to have it forget, and whoever wants another file waits a little for that.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Files between two looks.
const EVERY: u32 = 64;
/// How often the shim is asked at most.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest that requests wait, from where there was no room: then they take what there is, and may fail.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks for files to be forgotten.
pub type Ask = Box<dyn Fn() + Send + Sync>;

/// What is known of the process' descriptors.
pub struct FdLimit {
    /// The directory of this process' descriptors.
    descriptors: File,
    /// From so many on there is little room.
    enough: u64,
    ask: Ask,
    count: AtomicU32,
    short: AtomicBool,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    /// Since when there is little room.
    since: Option<Instant>,
    asked: Option<Instant>,
}

impl FdLimit {
    /// Up to `enough` descriptors there is room; `ask` is called from there on, now and then.
    ///
    /// # Errors
    /// When there is no /proc.
    pub fn new(enough: u64, ask: Ask) -> io::Result<Self> {
        Ok(Self {
            descriptors: File::open("/proc/self/fd")?,
            enough,
            ask,
            count: AtomicU32::new(0),
            short: AtomicBool::new(false),
            state: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    /// Before a request that may open something. Waits for room, but not for long.
    pub fn take(&self) {
        let turn = self.count.fetch_add(1, Ordering::Relaxed).is_multiple_of(EVERY);
        if turn || self.short.load(Ordering::Relaxed) {
            self.wait();
        }
    }

    /// After files have been forgotten.
    pub fn freed(&self) {
        if self.short.load(Ordering::Relaxed) {
            // Whoever looks has this, and sees either what is free or the notification.
            drop(self.lock());
            self.freed.notify_all();
        }
    }

    fn wait(&self) {
        let mut state = self.lock();
        loop {
            if self.is_there() {
                state.since = None;
                self.short.store(false, Ordering::Relaxed);
                return;
            }
            self.short.store(true, Ordering::Relaxed);
            let waited = state.since.get_or_insert_with(Instant::now).elapsed();
            if state.asked.is_none_or(|asked| asked.elapsed() >= AGAIN) {
                state.asked = Some(Instant::now());
                drop(state);
                (self.ask)();
                state = self.lock();
                continue;
            }
            let Some(left) = PATIENCE.checked_sub(waited).filter(|left| !left.is_zero()) else { return };
            let woken = self.freed.wait_timeout(state, left.min(AGAIN));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_there(&self) -> bool {
        // Linux 6.2 and later tell how many there are (proc_readfd_count() in fs/proc/fd.c). To any, a new descriptor has the
        // lowest number that is free: all below it are in use.
        let counted = self.descriptors.metadata().map_or(0, |directory| directory.len());
        let lowest = self.descriptors.try_clone().map_or(u64::MAX, |lowest| lowest.as_raw_fd().unsigned_abs().into());
        counted.max(lowest) < self.enough
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    #[test]
    fn whoever_has_no_room_asks_and_waits_until_some_is_free() {
        let lowest = || File::open("/dev/null").unwrap();
        // As many as other tests may have open meanwhile: the first number that is free is above.
        let held: Vec<File> = std::iter::repeat_with(lowest).take(600).collect();
        let (asks, asked) = channel();
        let room = Arc::new(FdLimit::new(500, Box::new(move || asks.send(()).unwrap())).unwrap());
        let waiting = std::thread::spawn({
            let room = Arc::clone(&room);
            move || room.take()
        });
        asked.recv().unwrap();
        assert!(!waiting.is_finished());
        drop(held);
        room.freed();
        waiting.join().unwrap();
        room.take();
        assert!(asked.try_recv().is_err() && !room.short.load(Ordering::Relaxed));
    }

    #[test]
    fn nobody_waits_forever() {
        let (asks, asked) = channel();
        let room = FdLimit::new(0, Box::new(move || asks.send(()).unwrap())).unwrap();
        let began = Instant::now();
        room.take();
        assert!(began.elapsed() >= PATIENCE && asked.try_iter().count() > 1);
        // Where waiting was of no use, the next does not wait either.
        let began = Instant::now();
        room.take();
        assert!(began.elapsed() < AGAIN);
    }
}
