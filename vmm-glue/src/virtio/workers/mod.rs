//! Worker threads of a device whose requests can block. A worker pops a request, calls the handler and returns the
//! result.
//!
//! The threads start when the device is created. The device loop, which activates the device, could not start the
//! threads, because its seccomp filter does not allow new threads. The worker threads serve one activation after
//! another, and end when the device is dropped.
//!
//! Idle workers wait for the queue's notification, and the kernel wakes only one of these workers (EPOLLEXCLUSIVE). A
//! worker that takes a request while other workers are idle enables the next notification. If the queue already has
//! another request, this worker signals the notification itself.
//!
//! If a rate limit does not admit the next request, one worker waits until the request is admitted. Until then, the
//! request stays in the queue, and the other workers are idle. Therefore, requests are admitted in their order. A pause
//! or the end of the activation only has to wait for requests that are being served.
//!
//! A request can hang, for example on a network file system whose server is gone. Such requests must not stop others.
//! If a handler has [`Handler::GROWTH`], a supervisor thread adds a worker when all workers hang. The additional
//! workers end when they have been idle for [`IDLE_TIME`]. Each request has a group, and the workers of a group are
//! limited ([`groups`]). Further requests of the group wait without a worker.

mod groups;
mod poll_time;
mod session;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait, wait_timeout};

use self::session::Session;
use super::device::{Interrupt, OnIdle};
use super::queue::{Chain, Virtqueue};
use super::rate_limit::SharedLimiter;
use crate::guest_memory::GuestMemory;
use crate::jail::{Kind, confine};

pub use self::session::{KeptRequest, Later};

/// Stack size of a worker. Handlers are not nested deeply, and their buffers are on the heap.
const STACK: usize = 256 * 1024;
/// Time after which an additional worker ends if it has nothing to do.
const IDLE_TIME: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Maximum time that the end of a device waits for its threads. A thread that hangs on the host ends with the process.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Limits and kind of the additional workers of a device.
pub struct Growth {
    /// Maximum number of additional workers.
    pub workers: usize,
    /// Maximum number of workers of one group, unless the device has more workers from its start.
    pub per_group: usize,
    /// Kind of the thread that starts the additional workers.
    pub supervisor: Kind,
}

/// Serves a device's requests.
pub trait Handler: Send + Sync + 'static {
    /// Name for threads and log lines.
    const NAME: &'static str;
    /// Kind of the threads.
    const KIND: Kind;
    /// If not `None`, workers are added when all workers hang.
    const GROWTH: Option<Growth> = None;
    /// Whether a worker polls the queue for a short time after a request ([`poll_time`]).
    const POLLS: bool = false;
    /// Returns the limiter of the requests.
    fn limiter(&self) -> &SharedLimiter;
    /// Returns the number of bytes for which a request needs tokens.
    fn bytes(&self, request: &Chain<'_>) -> usize;
    /// Serves one request. Returns the number of bytes written to the chain, or `None` if the handler has called
    /// [`Later::keep`]. Then the handler ends the request later, and the worker serves other requests.
    fn serve(&self, memory: &GuestMemory, request: Chain<'_>, later: Later<'_>) -> Option<u32>;
    /// Returns the group of a request. The guest may change the request afterwards, so the group is only a hint.
    fn group(&self, _request: &Chain<'_>) -> u64 {
        0
    }
    /// Answers a request with an error, because its group hangs. Returns the number of bytes written to the chain.
    fn refuse(&self, _request: &Chain<'_>) -> u32 {
        0
    }
    /// Runs a job that was queued with [`Workers::submit`].
    fn run_job(&self, _job: u64) {}
}

/// The worker threads of a device. Dropping the value ends the threads.
pub struct Workers<H: Handler> {
    pool: Arc<Pool<H>>,
}

struct Pool<H> {
    handler: Arc<H>,
    /// Number of workers that start with the device.
    count: usize,
    state: Mutex<PoolState>,
    changed: Condvar,
    /// Whether the log already has a line that no worker could be added.
    reported: AtomicBool,
}

#[derive(Default)]
struct PoolState {
    /// The activation that the workers serve.
    session: Option<Arc<Session>>,
    /// Number of workers that are in a session. If `session` is `None`, these workers are about to leave an earlier
    /// session.
    inside: usize,
    /// Closures to call when the last worker has left the earlier session.
    when_idle: Vec<OnIdle>,
    paused: bool,
    /// Whether the threads must end.
    ended: bool,
    /// The threads, including some that have ended.
    threads: Vec<JoinHandle<()>>,
    /// Number of threads that have not ended.
    running: usize,
    /// Number of additional workers that have not ended.
    added: usize,
}

/// What a thread does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Worker,
    AddedWorker,
    Supervisor,
}

impl<H: Handler> Workers<H> {
    /// Starts `count` threads. Returns when all threads are confined. The threads wait until [`Workers::activate`] is
    /// called.
    ///
    /// # Errors
    /// If a thread cannot be started or confined.
    pub fn start(count: u8, handler: Arc<H>) -> io::Result<Self> {
        let pool = Pool {
            handler,
            count: count.into(),
            state: Mutex::default(),
            changed: Condvar::new(),
            reported: AtomicBool::new(false),
        };
        // If the start fails, dropping `this` ends the threads that were started.
        let this = Self { pool: Arc::new(pool) };
        let (confined, results) = channel();
        for number in 0..count {
            this.pool.spawn(format!("{}{number}", H::NAME), Role::Worker, confined.clone())?;
        }
        if let Some(growth) = H::GROWTH {
            this.pool.spawn(growth.supervisor.thread_name().to_owned(), Role::Supervisor, confined.clone())?;
        }
        drop(confined);
        results.iter().try_for_each(|result: io::Result<()>| result)?;
        Ok(this)
    }

    /// Makes the workers serve a queue. Before the call, the device must be inactive, and its workers must be idle.
    ///
    /// # Errors
    /// If an eventfd cannot be created.
    pub fn activate(
        &self,
        memory: Arc<GuestMemory>,
        queue: Virtqueue,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<()> {
        let count = self.pool.count;
        let (added, per_group) = H::GROWTH.map_or((0, usize::MAX), |growth| (growth.workers, growth.per_group));
        let mut pool = lock(&self.pool.state);
        let session = Session::new(memory, queue, interrupt, pool.paused, (count, added), per_group.max(count))?;
        pool.session = Some(Arc::new(session));
        self.pool.changed.notify_all();
        Ok(())
    }

    /// Returns the state of the queue of the activation. Returns `None` if there is none, or requests are being served.
    pub fn queue_state(&self) -> Option<virtio_queue::QueueState> {
        let session = lock(&self.pool.state).session.clone();
        session.and_then(|session| session.queue_state())
    }

    /// Ends the activation, if there is one. Does not wait for requests that are being served.
    pub fn deactivate(&self) {
        if let Some(session) = lock(&self.pool.state).session.take() {
            session.end(H::NAME);
        }
    }

    /// Queues jobs for the workers. Each job has a group and a number. Without an activation, the jobs are dropped.
    pub fn submit(&self, jobs: impl IntoIterator<Item = (u64, u64)>) {
        let session = lock(&self.pool.state).session.clone();
        if let Some(session) = session {
            session.submit(H::NAME, jobs);
        }
    }

    /// Returns the number of additional workers.
    #[cfg(test)]
    pub fn added(&self) -> usize {
        lock(&self.pool.state).added
    }

    /// Calls `idle` when all requests of earlier activations have ended. The caller must have called
    /// [`Workers::deactivate`]. If a request hangs, the call comes when the request ends. The device loop does not
    /// wait for it: only the guest's driver waits for the end of the reset.
    pub fn when_idle(&self, idle: OnIdle) {
        let mut pool = lock(&self.pool.state);
        if pool.inside > 0 {
            return pool.when_idle.push(idle);
        }
        drop(pool);
        idle();
    }

    /// Pauses the workers. Returns when no request is being served, or when the requests that are being served hang. No
    /// further request is served until [`Workers::resume`] is called.
    pub fn pause(&self) {
        let mut pool = lock(&self.pool.state);
        pool.paused = true;
        let session = loop {
            if let Some(session) = pool.session.clone() {
                break session;
            }
            if pool.inside == 0 {
                return;
            }
            let (state, waited) = wait_timeout(&self.pool.changed, pool, session::PAUSE_TIMEOUT);
            pool = state;
            if waited.timed_out() {
                return log::warn!("{}: paused while requests hang on the host", H::NAME);
            }
        };
        drop(pool);
        session.pause(H::NAME);
    }

    /// Resumes the workers.
    pub fn resume(&self) {
        let session = {
            let mut pool = lock(&self.pool.state);
            pool.paused = false;
            pool.session.clone()
        };
        if let Some(session) = session {
            session.resume(H::NAME);
        }
    }
}

impl<H: Handler> Drop for Workers<H> {
    fn drop(&mut self) {
        self.deactivate();
        let end = Instant::now() + END_TIMEOUT;
        let mut pool = lock(&self.pool.state);
        pool.ended = true;
        self.pool.changed.notify_all();
        while pool.running > 0 {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return log::warn!("{}: {} threads hang on the host, and end with the VMM", H::NAME, pool.running);
            };
            (pool, _) = wait_timeout(&self.pool.changed, pool, left);
        }
        let threads = std::mem::take(&mut pool.threads);
        drop(pool);
        for thread in threads {
            if thread.join().is_err() {
                log::error!("{}: a worker thread panicked", H::NAME);
            }
        }
    }
}

impl<H: Handler> Pool<H> {
    /// Starts a thread. The thread sends the result of its confinement.
    fn spawn(self: &Arc<Self>, name: String, role: Role, confined: Sender<io::Result<()>>) -> io::Result<()> {
        let pool = Arc::clone(self);
        // The lock is held, so that the thread does not end before it is counted.
        let mut state = lock(&self.state);
        let thread = std::thread::Builder::new().name(name).stack_size(STACK);
        let thread = thread.spawn(move || {
            pool.run(role, confined);
            let mut state = lock(&pool.state);
            state.running -= 1;
            state.added -= usize::from(role == Role::AddedWorker);
            drop(state);
            pool.changed.notify_all();
        })?;
        // A thread that has ended is detached, which also releases its stack.
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.push(thread);
        state.running += 1;
        state.added += usize::from(role == Role::AddedWorker);
        Ok(())
    }

    /// Main function of a thread. Sends the result of confining the thread.
    fn run(self: &Arc<Self>, role: Role, confined: Sender<io::Result<()>>) {
        let kind = H::GROWTH.filter(|_| role == Role::Supervisor).map_or(H::KIND, |growth| growth.supervisor);
        let result = confine(kind).map_err(io::Error::other);
        let failed = result.is_err();
        // The send fails only if the start of another thread has failed. Then nobody needs this result.
        let _ = confined.send(result);
        drop(confined);
        if failed {
            return;
        }
        let mut served = None;
        while let Some(session) = self.enter(served.as_ref(), role) {
            match role {
                Role::Supervisor => session.supervise(H::NAME, || self.add_worker()),
                Role::Worker => session.run(&*self.handler, None),
                Role::AddedWorker => session.run(&*self.handler, Some(IDLE_TIME)),
            }
            if role != Role::Supervisor {
                self.leave();
            }
            if role == Role::AddedWorker {
                return;
            }
            served = Some(session);
        }
    }

    /// Adds a worker. Returns false if there are already enough, or if the thread cannot be started.
    fn add_worker(self: &Arc<Self>) -> bool {
        let added = lock(&self.state).added;
        let result = if H::GROWTH.is_some_and(|growth| added < growth.workers) {
            let (confined, result) = channel();
            self.spawn(format!("{}+{added}", H::NAME), Role::AddedWorker, confined)
                .and_then(|()| result.recv().unwrap_or_else(|error| Err(io::Error::other(error))))
        } else {
            Err(io::Error::other(format!("{added} additional workers hang")))
        };
        match result {
            Ok(()) => self.reported.store(false, Ordering::Relaxed),
            Err(error) if !self.reported.swap(true, Ordering::Relaxed) => {
                log::warn!("{}: requests hang on the host, and no worker can be added: {error}", H::NAME);
            }
            Err(_) => return false,
        }
        !self.reported.load(Ordering::Relaxed)
    }

    /// Records that this worker has left its session. The last worker to leave calls the closures of `when_idle`.
    fn leave(&self) {
        let mut pool = lock(&self.state);
        pool.inside -= 1;
        let idle = if pool.inside == 0 { std::mem::take(&mut pool.when_idle) } else { Vec::new() };
        drop(pool);
        self.changed.notify_all();
        idle.into_iter().for_each(|idle| idle());
    }

    /// Waits for a session other than `served`. Returns `None` if the thread must end. An added worker does not wait.
    fn enter(&self, served: Option<&Arc<Session>>, role: Role) -> Option<Arc<Session>> {
        let mut pool = lock(&self.state);
        loop {
            if pool.ended {
                return None;
            }
            let new = pool.session.as_ref().filter(|session| served.is_none_or(|served| !Arc::ptr_eq(session, served)));
            if let Some(session) = new.cloned() {
                pool.inside += usize::from(role != Role::Supervisor);
                return Some(session);
            }
            if role == Role::AddedWorker {
                return None;
            }
            pool = wait(&self.changed, pool);
        }
    }
}

#[cfg(test)]
mod tests;
