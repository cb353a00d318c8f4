//! Threads that wait for locks in the host's kernel, one for each wait. For a lock in a file table, a thread of this
//! table makes the system call ([`super::file_table`]).
//!
//! A manager thread starts the other threads, because its seccomp filter allows new threads, and because the threads
//! inherit its filter. A signal interrupts a wait. The signal is lost if it arrives before the thread has entered the
//! system call. Therefore, the manager repeats the signal until the thread has noticed the interruption. The device
//! loop, which receives INTERRUPT, never blocks.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Builder;
use std::time::Duration;

use husk_base::sync::{lock, wait, wait_timeout};
use husk_base::sys::thread::send_signal;
use nix::unistd::{Pid, gettid};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::jail::{Kind, confine};

/// Maximum number of waits of a pod. A wait counts until its thread has nothing left to do but to send the answer.
pub const MAX_WAITS: usize = 64;
/// Maximum number of early interrupts that are remembered. The request queue of the device has room for as many
/// requests.
const MAX_EARLY: usize = 512;
/// Stack size of a thread. The threads only make system calls and return answers.
const STACK: usize = 128 * 1024;
/// Time after which the manager repeats a signal for the first time. The time doubles up to [`MAX_REPEAT`].
const FIRST_REPEAT: Duration = Duration::from_millis(1);
/// Maximum time after which the manager repeats a signal. Some host file systems do not notice the signal until their
/// server answers.
const MAX_REPEAT: Duration = Duration::from_secs(1);

/// Waits for a lock in a system call.
type Attempt = Box<dyn FnMut(&Calls) -> io::Result<()> + Send>;

/// A wait for a lock.
pub struct Job {
    /// Waits for the lock in a system call, which it makes with [`Calls::call`]. The function is called again if it
    /// fails with EWOULDBLOCK, or with EINTR although the wait was not interrupted.
    pub wait: Attempt,
    /// Ends the wait. The function may close a file, which can hang on the host. If no thread could be started for the
    /// wait, the manager calls the function with `false`. The function must then not block.
    pub end: Box<dyn FnOnce(bool) + Send>,
    /// Sends the answer after `end`. The function gets EINTR if the wait was interrupted.
    pub answer: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// The system calls of a wait, which an interruption of the wait ends.
#[derive(Clone)]
pub struct Calls {
    shared: Arc<Shared>,
    unique: u64,
}

impl Calls {
    /// Makes a system call in this thread, which need not be the thread of the wait. Fails with EINTR, without making
    /// the call, if the wait is already interrupted.
    ///
    /// # Errors
    /// The errors of the call.
    pub fn call(&self, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if !self.shared.enter(self.unique, gettid()) {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        let result = call();
        self.shared.leave(self.unique);
        result
    }
}

/// The waits of one device. If the value is dropped, all waits are interrupted, and their threads end.
pub struct Waiters(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Stack size of a waiting thread.
    stack: usize,
}

#[derive(Default)]
struct State {
    /// Waits that have no thread yet, by the request's unique id.
    new: VecDeque<(u64, Job)>,
    /// All waits that have not got a result, by the request's unique id.
    waits: HashMap<u64, Wait>,
    /// Number of waits that count for [`MAX_WAITS`].
    count: usize,
    /// Unique ids of requests that were interrupted before they began to wait.
    early: VecDeque<u64>,
    /// Whether no wait may begin, because the device is not active.
    forbidden: bool,
    ended: bool,
}

#[derive(Default)]
struct Wait {
    /// The thread, while it is in the system call or about to enter it.
    thread: Option<Pid>,
    interrupted: bool,
}

/// Returns the signal that interrupts a wait. The vCPUs use SIGRTMIN.
fn signal() -> i32 {
    SIGRTMIN() + 1
}

/// Does nothing. A signal without a handler would not interrupt the system call, but end the process.
extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Waiters {
    /// Starts the manager thread. Returns when the thread is confined.
    ///
    /// # Errors
    /// If the thread cannot be started or confined.
    pub fn start() -> io::Result<Self> {
        Self::start_with(STACK)
    }

    fn start_with(stack: usize) -> io::Result<Self> {
        register_signal_handler(signal(), on_signal).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), stack });
        let this = Self(Arc::clone(&shared));
        let (confined, result) = channel();
        Builder::new().name(Kind::LockWaiter.thread_name().to_owned()).stack_size(STACK).spawn(move || {
            let result = confine(Kind::LockWaiter).map_err(io::Error::other);
            let failed = result.is_err();
            // The receiver waits for the result.
            let _ = confined.send(result);
            drop(confined);
            if !failed {
                shared.manage();
            }
        })?;
        result.recv().map_err(io::Error::other)??;
        Ok(this)
    }

    /// Starts a wait for the request `unique`.
    ///
    /// # Errors
    /// EINTR if the request is already interrupted or no wait may begin, and ENOLCK if there are too many waits. No
    /// function of the job is then called.
    pub fn add(&self, unique: u64, job: Job) -> io::Result<()> {
        let mut state = lock(&self.0.state);
        if state.take_early(unique) || state.forbidden {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        // The guest chooses the ids. An id that is in use must not hide another wait.
        if state.ended || state.count >= MAX_WAITS || state.waits.contains_key(&unique) {
            return Err(io::Error::from_raw_os_error(libc::ENOLCK));
        }
        state.waits.insert(unique, Wait::default());
        state.count += 1;
        state.new.push_back((unique, job));
        self.0.changed.notify_all();
        Ok(())
    }

    /// Interrupts the wait of a request. If there is no such wait, the next wait of this request ends at once.
    pub fn interrupt(&self, unique: u64) {
        let mut state = lock(&self.0.state);
        match state.waits.get_mut(&unique) {
            Some(wait) => {
                wait.interrupted = true;
                self.0.changed.notify_all();
            }
            None => {
                if state.early.len() >= MAX_EARLY {
                    state.early.pop_front();
                }
                state.early.push_back(unique);
            }
        }
    }

    /// Forgets that a request was interrupted, because the request has ended without a wait.
    pub fn forget(&self, unique: u64) {
        lock(&self.0.state).take_early(unique);
    }

    /// Returns the number of threads that are in a system call or about to enter it.
    #[cfg(test)]
    pub fn in_calls(&self) -> usize {
        lock(&self.0.state).waits.values().filter(|wait| wait.thread.is_some()).count()
    }

    /// Interrupts all waits.
    pub fn interrupt_all(&self) {
        lock(&self.0.state).interrupt_all();
        self.0.changed.notify_all();
    }

    /// Allows new waits, or interrupts all waits and allows no new ones.
    pub fn allow(&self, allowed: bool) {
        let mut state = lock(&self.0.state);
        state.forbidden = !allowed;
        if !allowed {
            state.interrupt_all();
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        self.interrupt_all();
        lock(&self.0.state).ended = true;
        self.0.changed.notify_all();
    }
}

impl State {
    fn interrupt_all(&mut self) {
        self.waits.values_mut().for_each(|wait| wait.interrupted = true);
        self.early.clear();
    }

    fn take_early(&mut self, unique: u64) -> bool {
        let at = self.early.iter().position(|&early| early == unique);
        at.is_some_and(|at| self.early.remove(at).is_some())
    }

    /// Sends a signal to each thread that is in a system call although its wait is interrupted. Returns whether there
    /// is such a thread.
    fn signal(&self) -> bool {
        let threads = self.waits.values().filter(|wait| wait.interrupted).filter_map(|wait| wait.thread);
        let mut any = false;
        for thread in threads {
            any = true;
            // The thread is alive, because it removes itself from the table, with the lock held, before it ends.
            if let Err(error) = send_signal(thread, signal()) {
                log::error!("failed to interrupt the wait for a lock: {error}");
            }
        }
        any
    }
}

impl Shared {
    /// Main function of the manager.
    fn manage(self: &Arc<Self>) {
        let mut repeat = FIRST_REPEAT;
        let mut state = lock(&self.state);
        loop {
            if let Some((unique, job)) = state.new.pop_front() {
                drop(state);
                self.start(unique, job);
                state = lock(&self.state);
                continue;
            }
            if state.signal() {
                let timeout;
                (state, timeout) = wait_timeout(&self.changed, state, repeat);
                repeat = if timeout.timed_out() { (repeat * 2).min(MAX_REPEAT) } else { FIRST_REPEAT };
            } else if state.ended && state.waits.is_empty() {
                return;
            } else {
                repeat = FIRST_REPEAT;
                state = wait(&self.changed, state);
            }
        }
    }

    fn start(self: &Arc<Self>, unique: u64, job: Job) {
        let Job { wait, end, answer } = job;
        // If the thread cannot be started, the closure is dropped. Therefore, the closure does not own these functions.
        let last = Arc::new(Mutex::new(Some((end, answer))));
        let (shared, taken) = (Arc::clone(self), Arc::clone(&last));
        let thread = Builder::new().name(Kind::LockWaiter.thread_name().to_owned()).stack_size(self.stack);
        let started = thread.spawn(move || {
            let result = shared.wait(unique, wait);
            let last = lock(&taken).take();
            if let Some((end, answer)) = last {
                end(true);
                lock(&shared.state).count -= 1;
                answer(result);
            }
        });
        if let Err(error) = started {
            log::error!("failed to start a thread that waits for a lock: {error}");
            let last = lock(&last).take();
            if let Some((end, answer)) = last {
                // The manager must not hang, because it interrupts the other waits.
                end(false);
                let mut state = lock(&self.state);
                state.waits.remove(&unique);
                state.count -= 1;
                drop(state);
                answer(Err(io::Error::from_raw_os_error(libc::ENOLCK)));
            }
        }
    }

    /// Waits until the lock is taken, the wait fails, or the wait is interrupted.
    fn wait(self: &Arc<Self>, unique: u64, mut attempt: Attempt) -> io::Result<()> {
        let calls = Calls { shared: Arc::clone(self), unique };
        let mut result = Err(io::Error::from_raw_os_error(libc::EINTR));
        while !self.is_interrupted(unique) {
            result = attempt(&calls);
            match &result {
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                    result = Err(io::Error::from_raw_os_error(libc::EINTR));
                }
                _ => break,
            }
        }
        lock(&self.state).waits.remove(&unique);
        self.changed.notify_all();
        result
    }

    fn is_interrupted(&self, unique: u64) -> bool {
        lock(&self.state).waits.get(&unique).is_none_or(|wait| wait.interrupted)
    }

    /// Records that a thread is about to wait. Returns false if the wait is interrupted.
    fn enter(&self, unique: u64, thread: Pid) -> bool {
        let mut state = lock(&self.state);
        let Some(wait) = state.waits.get_mut(&unique).filter(|wait| !wait.interrupted) else { return false };
        wait.thread = Some(thread);
        true
    }

    fn leave(&self, unique: u64) {
        if let Some(wait) = lock(&self.state).waits.get_mut(&unique) {
            wait.thread = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender};

    use husk_base::sys::file_lock::{Flock, flock};

    use super::*;

    type Results = (Sender<Option<i32>>, Receiver<Option<i32>>);

    /// Returns a wait for the lock of a file. The errno of the result is sent to a channel.
    fn job(file: &tempfile::NamedTempFile, results: &Results) -> Job {
        let (file, results) = (file.reopen().unwrap(), results.0.clone());
        let answer = move |result: io::Result<()>| {
            results.send(result.err().and_then(|error| error.raw_os_error())).unwrap();
        };
        let wait = Box::new(move |calls: &Calls| calls.call(|| flock(&file, Flock::Exclusive, true)));
        Job { wait, end: Box::new(|_| {}), answer: Box::new(answer) }
    }

    fn errno(result: io::Result<()>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks flock")]
    fn waits_that_hang_at_their_end_are_bounded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (waiters, results, (ending, ends)) = (Waiters::start().unwrap(), channel(), channel());
        let (release, hang) = channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        for unique in 0..MAX_WAITS as u64 {
            let (ending, hang) = (ending.clone(), Arc::clone(&hang));
            let end = Box::new(move |may_block| {
                ending.send(may_block).unwrap();
                // The channel is closed when the hang ends.
                let _ = lock(&hang).recv();
            });
            waiters.add(unique, Job { end, ..job(&file, &results) }).unwrap();
        }
        // All have got the lock, and none has sent its answer.
        assert!((0..MAX_WAITS).all(|_| ends.recv().unwrap()));
        assert_eq!(errno(waiters.add(1000, job(&file, &results))), Some(libc::ENOLCK));
        drop(release);
        for _ in 0..MAX_WAITS {
            assert_eq!(results.1.recv().unwrap(), None);
        }
        waiters.add(1000, job(&file, &results)).unwrap();
        assert_eq!(results.1.recv().unwrap(), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks the signal handler")]
    fn manager_does_not_block_when_no_thread_can_be_started() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // No address space has room for such a stack.
        let (waiters, results, (ending, ends)) = (Waiters::start_with(1 << 50).unwrap(), channel(), channel());
        for unique in 0..2 * MAX_WAITS as u64 {
            let ending = ending.clone();
            let end = Box::new(move |may_block| ending.send(may_block).unwrap());
            waiters.add(unique, Job { end, ..job(&file, &results) }).unwrap();
            assert_eq!((ends.recv().unwrap(), results.1.recv().unwrap()), (false, Some(libc::ENOLCK)));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks flock")]
    fn no_wait_begins_while_waits_are_forbidden() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let host = file.reopen().unwrap();
        flock(&host, Flock::Exclusive, false).unwrap();
        let (waiters, results) = (Waiters::start().unwrap(), channel());
        waiters.add(1, job(&file, &results)).unwrap();
        waiters.allow(false);
        assert_eq!(results.1.recv().unwrap(), Some(libc::EINTR));
        assert_eq!(errno(waiters.add(2, job(&file, &results))), Some(libc::EINTR));
        waiters.allow(true);
        waiters.add(2, job(&file, &results)).unwrap();
        flock(&host, Flock::Unlock, false).unwrap();
        assert_eq!(results.1.recv().unwrap(), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks flock")]
    fn waits_are_bounded_and_all_are_interrupted_at_the_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        flock(&file, Flock::Exclusive, false).unwrap();
        let (waiters, results) = (Waiters::start().unwrap(), channel());
        for unique in 0..MAX_WAITS as u64 {
            waiters.add(unique, job(&file, &results)).unwrap();
        }
        assert_eq!(errno(waiters.add(1000, job(&file, &results))), Some(libc::ENOLCK));
        waiters.interrupt(3);
        assert_eq!(results.1.recv().unwrap(), Some(libc::EINTR));
        waiters.add(1000, job(&file, &results)).unwrap();
        assert_eq!(errno(waiters.add(1000, job(&file, &results))), Some(libc::ENOLCK));
        drop(waiters);
        for _ in 0..MAX_WAITS {
            assert_eq!(results.1.recv().unwrap(), Some(libc::EINTR));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks flock")]
    fn early_interrupts_are_remembered_once_and_bounded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (waiters, results) = (Waiters::start().unwrap(), channel());
        let add = |unique| waiters.add(unique, job(&file, &results)).map_err(|error| error.raw_os_error());
        waiters.interrupt(1);
        assert_eq!(add(1), Err(Some(libc::EINTR)));
        assert_eq!(add(1), Ok(()));
        assert_eq!(results.1.recv().unwrap(), None);
        for unique in 10..11 + MAX_EARLY as u64 {
            waiters.interrupt(unique);
        }
        assert_eq!(lock(&waiters.0.state).early.len(), MAX_EARLY);
        // The first id was forgotten, and the next one was not.
        assert_eq!(add(10), Ok(()));
        assert_eq!(results.1.recv().unwrap(), None);
        assert_eq!(add(11), Err(Some(libc::EINTR)));
    }
}
