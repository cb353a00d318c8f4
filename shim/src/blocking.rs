//! Runs blocking code on threads, and reports an error if no thread can be started.
//!
//! tokio's `spawn_blocking` panics if no thread can be started, for example because the pod's cgroup has reached its
//! limit of pids. A panic would end the shim, and with it the pod.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Condvar, Mutex};
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::Duration;

use husk_base::sync::{lock, wait_timeout};
use tokio::sync::oneshot;

/// Maximum number of threads. Each call that hangs in a file system occupies a thread. If all threads are occupied,
/// further calls wait.
const MAX_THREADS: usize = 64;
/// Maximum number of abandoned threads that do not count for [`MAX_THREADS`].
const MAX_REPLACED: usize = 32;
/// How long an idle thread waits for the next call before it ends.
const IDLE: Duration = Duration::from_secs(1);

/// Work of a thread.
pub type Job = Box<dyn FnOnce() + Send>;

static POOL: Pool = Pool::new();

/// Starts `work` on another thread, without waiting for the first poll. If all threads are occupied, `work` waits. Once
/// started, it runs to completion, even if the returned [`Task`] is dropped.
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (sender, receiver) = oneshot::channel();
    #[cfg(test)]
    let clock = tests::hold_paused_clock();
    let job = Box::new(move || {
        drop(sender.send(work()));
        #[cfg(test)]
        drop(clock);
    });
    let start = || thread::Builder::new().name("husk-shim".into()).spawn(|| POOL.work()).map(drop);
    Task { error: POOL.run(job, start).err(), receiver }
}

/// The result of [`spawn`]. The future is ready when the work has ended.
///
/// # Errors
/// The future's output is an error if no thread could be started, or if the work panicked.
#[must_use = "the result may be an error"]
pub struct Task<T> {
    error: Option<io::Error>,
    receiver: oneshot::Receiver<T>,
}

impl<T> Future for Task<T> {
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(error) = self.error.take() {
            return Poll::Ready(Err(error));
        }
        let result = ready!(Pin::new(&mut self.receiver).poll(context));
        Poll::Ready(result.map_err(|_| io::Error::other("a blocking call panicked")))
    }
}

/// Threads that run jobs.
pub struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Jobs that no thread has taken yet.
    jobs: VecDeque<Job>,
    threads: usize,
    /// The number of threads that wait for a job.
    idle: usize,
    /// The number of threads whose job nobody waits for.
    abandoned: usize,
}

impl Pool {
    /// Returns a pool without threads.
    pub const fn new() -> Self {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0, abandoned: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Adds a job. If another thread is needed, calls `start`. The new thread must call [`Pool::work`].
    ///
    /// # Errors
    /// The error of `start`.
    pub fn run(&self, job: Job, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.start_for(1, start)?;
        state.jobs.push_back(job);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Records that nobody waits any longer for a job that a thread runs. Another thread may then replace this thread.
    /// If a job needs a thread, calls `start`, as [`Pool::run`] does.
    ///
    /// # Errors
    /// The error of `start`.
    pub fn abandon(&self, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.abandoned += 1;
        state.start_for(0, start)
    }

    /// Records that an abandoned job has ended.
    pub fn resume(&self) {
        let mut state = lock(&self.state);
        state.abandoned = state.abandoned.saturating_sub(1);
    }

    /// Runs jobs until there has been none for [`IDLE`].
    pub fn work(&self) {
        let _ended = Ended(self);
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        if let Some(job) = state.jobs.pop_front() {
            return Some(job);
        }
        state.idle += 1;
        let (mut state, _) = wait_timeout(&self.changed, state, IDLE);
        state.idle -= 1;
        state.jobs.pop_front()
    }
}

impl State {
    /// Calls `start` if the queued jobs and `further` ones need another thread.
    fn start_for(&mut self, further: usize, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let counted = self.threads - self.abandoned.min(MAX_REPLACED);
        if self.jobs.len() + further > self.idle && counted < MAX_THREADS {
            start().map_err(|error| {
                let text =
                    format!("failed to start a thread, because the node or the pod's cgroup has too many: {error}");
                io::Error::new(error.kind(), text)
            })?;
            self.threads += 1;
        }
        Ok(())
    }
}

/// Counts a thread as ended when dropped, even if a job panics.
struct Ended<'a>(&'a Pool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Keeps tokio's paused clock from advancing until the returned value is dropped. The clock advances whenever tokio
    /// has nothing to do, except while one of tokio's own blocking tasks runs.
    pub fn hold_paused_clock() -> mpsc::Sender<()> {
        let (running, ended) = mpsc::channel::<()>();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || ended.recv());
        }
        running
    }

    #[tokio::test]
    async fn spawn_runs_work_even_if_the_task_is_dropped() {
        let (sender, receiver) = mpsc::channel();
        drop(spawn(move || sender.send(7)));
        assert_eq!(spawn(move || receiver.recv()).await.unwrap(), Ok(7));
    }

    #[tokio::test]
    async fn task_reports_a_panic() {
        let error = spawn(|| panic!("of the test")).await.unwrap_err();
        assert_eq!(error.to_string(), "a blocking call panicked");
    }

    #[test]
    fn run_reports_that_no_thread_can_be_started() {
        let pool = Pool::new();
        let error = pool.run(Box::new(|| ()), || Err(io::Error::from_raw_os_error(libc::EAGAIN))).unwrap_err();
        assert!(error.to_string().starts_with("failed to start a thread"), "{error}");
        let state = lock(&pool.state);
        assert_eq!((state.threads, state.jobs.len()), (0, 0));
    }

    #[test]
    fn threads_run_all_jobs_and_are_bounded() {
        let pool = Pool::new();
        let (sender, receiver) = mpsc::channel();
        let mut started = 0;
        for number in 0..2 * MAX_THREADS {
            let sender = sender.clone();
            let job = Box::new(move || sender.send(number).unwrap());
            pool.run(job, || {
                started += 1;
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(started, MAX_THREADS);
        pool.work();
        assert!((0..2 * MAX_THREADS).eq(receiver.try_iter()));
        assert_eq!(lock(&pool.state).threads, MAX_THREADS - 1);
    }

    #[test]
    fn threads_that_hang_are_replaced() {
        let (pool, started) = (Pool::new(), std::cell::Cell::new(0));
        let start = || {
            started.set(started.get() + 1);
            Ok(())
        };
        for _ in 0..2 * MAX_THREADS {
            pool.run(Box::new(|| ()), start).unwrap();
        }
        for _ in 0..2 * MAX_REPLACED {
            pool.abandon(start).unwrap();
        }
        assert_eq!(started.get(), MAX_THREADS + MAX_REPLACED);
        (0..2 * MAX_REPLACED).for_each(|_| pool.resume());
        pool.run(Box::new(|| ()), start).unwrap();
        assert_eq!(started.get(), MAX_THREADS + MAX_REPLACED);
    }
}
