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

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use husk_base::error::chain;
use husk_base::sync::{lock, wait, wait_timeout};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Interrupt, OnIdle};
use super::queue::{Chain, QueueFault, Virtqueue};
use super::rate_limit::SharedLimiter;
use crate::guest_memory::GuestMemory;
use crate::jail::{Kind, confine};

/// Stack size of a worker. Handlers are not nested deeply, and their buffers are on the heap.
const STACK: usize = 256 * 1024;

/// Serves a device's requests.
pub trait Handler: Send + Sync + 'static {
    /// Name for threads and log lines.
    const NAME: &'static str;
    /// Kind of the threads.
    const KIND: Kind;
    /// Returns the limiter of the requests.
    fn limiter(&self) -> &SharedLimiter;
    /// Returns the number of bytes for which a request needs tokens.
    fn bytes(&self, request: &Chain<'_>) -> usize;
    /// Serves one request. Returns the number of bytes written to the chain, or `None` if the handler has called
    /// [`Later::keep`]. Then the handler ends the request later, and the worker serves other requests.
    fn serve(&self, memory: &GuestMemory, request: Chain<'_>, later: Later<'_>) -> Option<u32>;
}

/// The right to end a request after [`Handler::serve`] has returned.
pub struct Later<'a> {
    session: &'a Arc<Session>,
    head: u16,
    name: &'static str,
}

impl Later<'_> {
    /// Keeps the request.
    pub fn keep(self) -> KeptRequest {
        KeptRequest { session: Arc::clone(self.session), head: self.head, name: self.name }
    }
}

/// A request that has no answer yet. The request does not keep a pause or the end of the activation waiting.
pub struct KeptRequest {
    session: Arc<Session>,
    head: u16,
    name: &'static str,
}

impl KeptRequest {
    /// Ends the request. `write` writes the answer, and returns the number of bytes written to the chain. Waits for the
    /// end of a pause. Does nothing if the activation has ended.
    pub fn end(self, write: impl FnOnce(&GuestMemory) -> u32) {
        let session = &*self.session;
        let mut state = session.lock();
        while state.paused && !state.stopped {
            state = wait(&session.changed, state);
        }
        if state.stopped || state.failed {
            return;
        }
        let used = write(&session.memory);
        let pushed = state.queue.push(&session.memory, self.head, used);
        let pushed = pushed.and_then(|()| state.queue.flush(&session.memory, &*session.interrupt));
        drop(state);
        if let Err(fault) = pushed {
            session.fail(self.name, &fault);
        }
    }
}

/// The worker threads of a device. Dropping the value ends the threads.
pub struct Workers<H: Handler> {
    pool: Arc<Pool<H>>,
    threads: Vec<JoinHandle<()>>,
}

struct Pool<H> {
    handler: Arc<H>,
    state: Mutex<PoolState>,
    changed: Condvar,
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
}

/// One activation of the device.
pub struct Session {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    notify: EventFd,
    stop: EventFd,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    queue: Virtqueue,
    /// Number of threads that wait for a notification.
    idle: usize,
    /// Number of requests that are being served.
    busy: usize,
    /// Whether a worker waits until the next request is admitted.
    throttled: bool,
    paused: bool,
    stopped: bool,
    /// Whether the driver broke the queue. No more requests are taken from a broken queue.
    failed: bool,
}

impl<H: Handler> Workers<H> {
    /// Starts `count` threads. Returns when all threads are confined. The threads wait until [`Workers::activate`] is
    /// called.
    ///
    /// # Errors
    /// If a thread cannot be started or confined.
    pub fn start(count: u8, handler: Arc<H>) -> io::Result<Self> {
        let pool = Arc::new(Pool { handler, state: Mutex::default(), changed: Condvar::new() });
        // If the start fails, dropping `this` ends the threads that were started.
        let mut this = Self { pool, threads: Vec::with_capacity(count.into()) };
        let (confined, results) = channel();
        for number in 0..count {
            let (pool, confined) = (Arc::clone(&this.pool), confined.clone());
            let thread = std::thread::Builder::new().name(format!("{}{number}", H::NAME)).stack_size(STACK);
            this.threads.push(thread.spawn(move || pool.run(confined))?);
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
        let notify = queue.notify_eventfd().try_clone()?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut pool = lock(&self.pool.state);
        let paused = pool.paused;
        let state = State { queue, idle: 0, busy: 0, throttled: false, paused, stopped: false, failed: false };
        let state = Mutex::new(state);
        let session = Session { memory, interrupt, notify, stop, state, changed: Condvar::new() };
        pool.session = Some(Arc::new(session));
        self.pool.changed.notify_all();
        Ok(())
    }

    /// Ends the activation, if there is one. Does not wait for requests that are being served.
    pub fn deactivate(&self) {
        if let Some(session) = lock(&self.pool.state).session.take() {
            session.end(H::NAME);
        }
    }

    /// Calls `idle` when all requests of earlier activations have ended. The caller must have called
    /// [`Workers::deactivate`].
    pub fn when_idle(&self, idle: OnIdle) {
        let mut pool = lock(&self.pool.state);
        if pool.inside > 0 {
            return pool.when_idle.push(idle);
        }
        drop(pool);
        idle();
    }

    /// Pauses the workers. Returns when no request is being served. No request is served until [`Workers::resume`] is
    /// called.
    pub fn pause(&self) {
        let mut pool = lock(&self.pool.state);
        pool.paused = true;
        while pool.session.is_none() && pool.inside > 0 {
            pool = wait(&self.pool.changed, pool);
        }
        let session = pool.session.clone();
        drop(pool);
        let Some(session) = session else { return };
        let mut state = session.lock();
        state.paused = true;
        while state.busy > 0 {
            state = wait(&session.changed, state);
        }
    }

    /// Resumes the workers.
    pub fn resume(&self) {
        let session = {
            let mut pool = lock(&self.pool.state);
            pool.paused = false;
            pool.session.clone()
        };
        let Some(session) = session else { return };
        session.lock().paused = false;
        session.changed.notify_all();
        // A worker may have cleared the notification during the pause, and then waited for the end of the pause.
        // Therefore, one worker checks the queue again.
        session.notify_one(H::NAME);
    }
}

impl<H: Handler> Drop for Workers<H> {
    fn drop(&mut self) {
        self.deactivate();
        lock(&self.pool.state).ended = true;
        self.pool.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("{}: a worker thread panicked", H::NAME);
            }
        }
    }
}

impl<H: Handler> Pool<H> {
    /// Main function of a thread. Sends the result of confining the thread.
    fn run(&self, confined: Sender<io::Result<()>>) {
        let result = confine(H::KIND).map_err(io::Error::other);
        let failed = result.is_err();
        // The send fails only if the start of another thread has failed. Then nobody needs this result.
        let _ = confined.send(result);
        drop(confined);
        if failed {
            return;
        }
        let mut served = None;
        while let Some(session) = self.enter(served.as_ref()) {
            session.run(&*self.handler);
            served = Some(session);
            self.leave();
        }
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

    /// Waits for a session other than `served`. Returns `None` if the thread must end.
    fn enter(&self, served: Option<&Arc<Session>>) -> Option<Arc<Session>> {
        let mut pool = lock(&self.state);
        loop {
            if pool.ended {
                return None;
            }
            let new = pool.session.as_ref().filter(|session| served.is_none_or(|served| !Arc::ptr_eq(session, served)));
            if let Some(session) = new.cloned() {
                pool.inside += 1;
                return Some(session);
            }
            pool = wait(&self.changed, pool);
        }
    }
}

impl Session {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes all workers leave the session.
    fn end(&self, name: &str) {
        self.lock().stopped = true;
        self.changed.notify_all();
        if let Err(error) = self.stop.write(1) {
            log::error!("{name}: failed to stop the worker threads: {error}");
        }
    }

    fn notify_one(&self, name: &str) {
        if let Err(error) = self.notify.write(1) {
            log::error!("{name}: failed to signal the queue's notification: {error}");
        }
    }

    /// Serves requests until the session ends, or until the thread fails to wait for a notification.
    fn run<H: Handler>(self: &Arc<Self>, handler: &H) {
        let epoll = match self.epoll() {
            Ok(epoll) => epoll,
            Err(error) => return log::error!("{}: failed to set up the wait for notifications: {error}", H::NAME),
        };
        loop {
            match self.serve_until_empty(handler) {
                Ok(true) => {}
                Ok(false) => return,
                Err(fault) => {
                    self.fail(H::NAME, &fault);
                    self.lock().idle += 1;
                }
            }
            let mut event = [EpollEvent::default()];
            if let Err(error) = epoll.wait(-1, &mut event)
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("{}: failed to wait for notifications: {error}", H::NAME);
                return;
            }
            // The read fails with EAGAIN if another thread has cleared the notification.
            let _ = self.notify.read();
            self.lock().idle -= 1;
        }
    }

    fn epoll(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        for (event, set) in [(&self.notify, EventSet::IN | EventSet::EXCLUSIVE), (&self.stop, EventSet::IN)] {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, 0))?;
        }
        Ok(epoll)
    }

    /// Serves requests until the queue is empty or another worker waits for the next request's admission, and then
    /// counts this thread as idle. Returns false if the session has ended.
    fn serve_until_empty<H: Handler>(self: &Arc<Self>, handler: &H) -> Result<bool, QueueFault> {
        let mut state = self.lock();
        loop {
            while state.paused && !state.stopped {
                state = wait(&self.changed, state);
            }
            if state.stopped {
                return Ok(false);
            }
            if state.throttled {
                // The throttled worker wakes an idle worker when the next request has been admitted.
                state.idle += 1;
                return Ok(true);
            }
            let popped = if state.failed { None } else { state.queue.pop(&self.memory)? };
            let Some(request) = popped else {
                if !state.failed && state.queue.enable_notification(&self.memory)? {
                    continue;
                }
                state.idle += 1;
                return Ok(true);
            };
            if let Err(delay) = handler.limiter().admit(|| handler.bytes(&request) as u64) {
                state.queue.undo_pop();
                state.throttled = true;
                (state, _) = wait_timeout(&self.changed, state, delay);
                state.throttled = false;
                continue;
            }
            if state.idle > 0 && state.queue.enable_notification(&self.memory)? {
                self.notify_one(H::NAME);
            }
            state.busy += 1;
            drop(state);
            let head = request.head;
            let used = handler.serve(&self.memory, request, Later { session: self, head, name: H::NAME });
            state = self.lock();
            state.busy -= 1;
            if state.busy == 0 {
                self.changed.notify_all();
            }
            let Some(used) = used else { continue };
            state.queue.push(&self.memory, head, used)?;
            state.queue.flush(&self.memory, &*self.interrupt)?;
        }
    }

    fn fail(&self, name: &str, fault: &QueueFault) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.failed, true) {
            log::error!("{name}: stopped serving requests: {}", chain(fault));
            if let Err(error) = self.interrupt.needs_reset() {
                log::error!("{name}: failed to request a reset: {error}");
            }
        }
    }
}

#[cfg(test)]
#[path = "workers_tests.rs"]
mod tests;
