//! One activation of a device with workers: the queue, and the loop in which a worker serves requests.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use husk_base::error::chain;
use husk_base::sync::{lock, wait, wait_timeout};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::groups::{Groups, Work};
use super::{Handler, poll_time};
use crate::guest_memory::GuestMemory;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{Chain, HeldChain, QueueFault, Virtqueue};

/// Maximum time that a pause waits for the requests that are being served.
pub const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
/// A worker is added if all workers have been busy for this time, and none has taken another request.
const GROW_DELAY: Duration = Duration::from_millis(100);
/// Time after which another worker is tried if none could be added.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Number of pauses of a processor between two looks at the queue.
const PAUSES: usize = 64;
/// Number of workers of a group while more than half of all workers are busy.
const FEW_WORKERS: usize = 2;

/// One activation of the device.
pub struct Session {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    notify: EventFd,
    stop: EventFd,
    state: Mutex<State>,
    changed: Condvar,
    /// Notified when the supervisor has something to do.
    supervise: Condvar,
    /// How long a worker polls the queue after a request.
    poll_time: Duration,
    /// Number of workers that the device has from its start.
    first_workers: usize,
    /// Maximum number of workers, with the additional ones.
    max_workers: usize,
}

struct State {
    queue: Virtqueue,
    /// Number of threads that serve this session.
    workers: usize,
    /// Number of threads that wait for a notification.
    idle: usize,
    /// Number of requests and jobs that are being served.
    busy: usize,
    /// Number of requests and jobs that were taken. Wraps around at its maximum.
    taken: u64,
    groups: Groups,
    /// Whether the supervisor waits for a notification without a timeout.
    supervisor_waits: bool,
    /// Whether a worker polls the queue. Then no other worker does, and the driver does not notify the device.
    polled: bool,
    /// Whether a worker waits until the next request is admitted.
    throttled: bool,
    paused: bool,
    /// Whether the pause has taken effect. Requests that hang until now get their answers after the pause.
    settled: bool,
    stopped: bool,
    /// Whether the driver broke the queue. No more requests are taken from a broken queue.
    failed: bool,
}

impl State {
    /// Returns whether no worker can take the next request until a request ends.
    fn is_stuck(&self) -> bool {
        self.workers > 0 && self.busy >= self.workers
    }
}

impl Session {
    /// Creates a session for `first_workers` workers and `added` additional ones. A group has at most `max_busy`
    /// workers.
    ///
    /// # Errors
    /// If an eventfd cannot be created.
    pub fn new(
        memory: Arc<GuestMemory>,
        queue: Virtqueue,
        interrupt: Arc<dyn Interrupt>,
        paused: bool,
        (first_workers, added): (usize, usize),
        max_busy: usize,
    ) -> io::Result<Self> {
        let notify = queue.notify_eventfd().try_clone()?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        // One group may hold a quarter of the driver's descriptors for a long time. Three groups that hang still leave
        // descriptors for the requests of others.
        let groups = Groups::new(max_busy, usize::from(queue.size()) / 4);
        let state = State {
            queue,
            workers: 0,
            idle: 0,
            busy: 0,
            taken: 0,
            groups,
            supervisor_waits: false,
            polled: false,
            throttled: false,
            paused,
            settled: paused,
            stopped: false,
            failed: false,
        };
        Ok(Self {
            memory,
            interrupt,
            notify,
            poll_time: poll_time::measure(&stop),
            stop,
            state: Mutex::new(state),
            changed: Condvar::new(),
            supervise: Condvar::new(),
            first_workers,
            max_workers: first_workers + added,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Returns the state of the queue. Returns `None` if requests are being served, or the driver broke the queue.
    pub fn queue_state(&self) -> Option<virtio_queue::QueueState> {
        let state = self.lock();
        state.queue.state().filter(|_| state.busy == 0 && !state.failed)
    }

    /// Makes all workers leave the session.
    pub fn end(&self, name: &str) {
        self.lock().stopped = true;
        self.changed.notify_all();
        self.supervise.notify_all();
        if let Err(error) = self.stop.write(1) {
            log::error!("{name}: failed to stop the worker threads: {error}");
        }
    }

    /// Pauses the session. Returns when no request is being served, or after [`PAUSE_TIMEOUT`].
    pub fn pause(&self, name: &str) {
        let mut state = self.lock();
        state.paused = true;
        let end = Instant::now() + PAUSE_TIMEOUT;
        while state.busy > 0 {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                log::warn!("{name}: paused while {} requests hang on the host", state.busy);
                break;
            };
            (state, _) = wait_timeout(&self.changed, state, left);
        }
        state.settled = true;
    }

    /// Resumes the session.
    pub fn resume(&self, name: &str) {
        let mut state = self.lock();
        (state.paused, state.settled) = (false, false);
        drop(state);
        self.changed.notify_all();
        // A worker may have cleared the notification during the pause, and then waited for the end of the pause.
        // Therefore, one worker checks the queue again.
        self.notify_one(name);
    }

    /// Queues jobs. Each has a group and a number.
    pub fn submit(&self, name: &str, jobs: impl IntoIterator<Item = (u64, u64)>) {
        let mut state = self.lock();
        for (group, job) in jobs {
            state.groups.queue(group, job);
        }
        let idle = state.idle > 0;
        drop(state);
        // If no worker is idle, the next worker that ends a request takes the jobs.
        if idle {
            self.notify_one(name);
        }
    }

    fn notify_one(&self, name: &str) {
        if let Err(error) = self.notify.write(1) {
            log::error!("{name}: failed to signal the queue's notification: {error}");
        }
    }

    /// Serves requests until the session ends, or until the thread fails to wait for a notification. If `idle_time` is
    /// given, the function also returns when the thread has been idle for this time, and another worker is idle.
    pub fn run<H: Handler>(self: &Arc<Self>, handler: &H, idle_time: Option<Duration>) {
        let epoll = match self.epoll() {
            Ok(epoll) => epoll,
            Err(error) => return log::error!("{}: failed to set up the wait for notifications: {error}", H::NAME),
        };
        self.lock().workers += 1;
        while self.serve(handler, &epoll, idle_time) {}
        self.lock().workers -= 1;
    }

    /// Serves requests until the queue is empty, and then waits for a notification. Returns false if the thread must
    /// leave the session.
    fn serve<H: Handler>(self: &Arc<Self>, handler: &H, epoll: &Epoll, idle_time: Option<Duration>) -> bool {
        match self.serve_until_empty(handler) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(fault) => {
                self.fail(H::NAME, &fault);
                self.lock().idle += 1;
            }
        }
        let timeout = idle_time.map_or(-1, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
        let mut event = [EpollEvent::default()];
        let ready = match epoll.wait(timeout, &mut event) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 1,
            Err(error) => {
                log::error!("{}: failed to wait for notifications: {error}", H::NAME);
                self.lock().idle -= 1;
                return false;
            }
        };
        if ready > 0 {
            // The read fails with EAGAIN if another thread has cleared the notification.
            let _ = self.notify.read();
        }
        let mut state = self.lock();
        state.idle -= 1;
        // While the other workers are busy, this worker stays. Otherwise the supervisor would add another one.
        ready > 0 || state.idle == 0
    }

    fn epoll(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        for (event, set) in [(&self.notify, EventSet::IN | EventSet::EXCLUSIVE), (&self.stop, EventSet::IN)] {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, 0))?;
        }
        Ok(epoll)
    }

    /// Returns the maximum number of workers of a group. If many groups hang, each group gets fewer workers. While
    /// there are no additional workers, not all workers hang.
    fn max_busy(&self, state: &State) -> usize {
        let many_hang = state.workers > self.first_workers && state.busy * 2 > self.max_workers;
        if many_hang { FEW_WORKERS } else { usize::MAX }
    }

    /// Serves requests until the queue is empty or another worker waits for the next request's admission, and then
    /// counts this thread as idle. Returns false if the session has ended.
    fn serve_until_empty<H: Handler>(self: &Arc<Self>, handler: &H) -> Result<bool, QueueFault> {
        let (mut state, mut polls) = (self.lock(), false);
        loop {
            while state.paused && !state.stopped {
                state = wait(&self.changed, state);
            }
            if state.stopped {
                return Ok(false);
            }
            if let Some(held) = state.groups.take_excess() {
                let request = held.chain();
                let (head, used) = (request.head, handler.refuse(&request));
                self.answer(&mut state, head, used)?;
                continue;
            }
            let max_busy = self.max_busy(&state);
            if let Some((group, work)) = state.groups.next(max_busy) {
                // This worker may have taken the wake-up of other work, and the work it does now may hang.
                if state.idle > 0 {
                    self.notify_one(H::NAME);
                }
                state = match work {
                    Work::Request(held) => self.serve_request(handler, state, group, held.chain())?,
                    Work::Job(job) => {
                        let mut state = self.busy(state, || handler.run_job(job)).0;
                        state.groups.leave(group);
                        state
                    }
                };
                polls = H::POLLS;
                continue;
            }
            if state.throttled {
                // The throttled worker wakes an idle worker when the next request has been admitted.
                state.idle += 1;
                return Ok(true);
            }
            let popped = if state.failed { None } else { state.queue.pop(&self.memory)? };
            let Some(request) = popped else {
                if std::mem::take(&mut polls) && !state.polled && !state.failed {
                    state = self.poll(state)?;
                    continue;
                }
                // A worker that polls takes the next request, or enables the notification.
                if !state.polled && !state.failed && state.queue.enable_notification(&self.memory)? {
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
            let group = handler.group(&request);
            if !state.groups.enter(group, max_busy) {
                // SAFETY: the chain was popped with `self.memory`.
                let held = unsafe { HeldChain::new(request, Arc::clone(&self.memory)) };
                state.groups.hold(group, held);
                state.taken = state.taken.wrapping_add(1);
                if state.groups.has_excess() {
                    self.wake_supervisor(&mut state);
                }
                continue;
            }
            if state.idle > 0 && state.queue.enable_notification(&self.memory)? {
                self.notify_one(H::NAME);
            }
            state = self.serve_request(handler, state, group, request)?;
            polls = H::POLLS;
        }
    }

    /// Polls until there is something to do, or the time to poll is over.
    fn poll<'s>(&'s self, mut state: MutexGuard<'s, State>) -> Result<MutexGuard<'s, State>, QueueFault> {
        let end = Instant::now() + self.poll_time;
        state.queue.suppress_notification(&self.memory)?;
        state.polled = true;
        let has_work = |state: &State| state.stopped || state.paused || state.failed || state.groups.is_held();
        while !has_work(&state) && !state.queue.has_chains(&self.memory) && Instant::now() < end {
            drop(state);
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
            state = self.lock();
        }
        state.polled = false;
        Ok(state)
    }

    /// Serves a request whose group has a worker for it.
    fn serve_request<'s, H: Handler>(
        self: &'s Arc<Self>,
        handler: &H,
        state: MutexGuard<'s, State>,
        group: u64,
        request: Chain<'_>,
    ) -> Result<MutexGuard<'s, State>, QueueFault> {
        let head = request.head;
        let later = Later::new(self, head, H::NAME);
        let (mut state, used) = self.busy(state, || handler.serve(&self.memory, request, later));
        state.groups.leave(group);
        if let Some(used) = used {
            while state.settled && !state.stopped {
                state = wait(&self.changed, state);
            }
            self.answer(&mut state, head, used)?;
        }
        Ok(state)
    }

    /// Ends a request that the handler has kept ([`KeptRequest::end`]).
    pub fn end_kept(&self, name: &str, head: u16, write: impl FnOnce(&GuestMemory) -> u32) {
        let mut state = self.lock();
        while state.paused && !state.stopped {
            state = wait(&self.changed, state);
        }
        if state.stopped || state.failed {
            return;
        }
        let used = write(&self.memory);
        let answered = self.answer(&mut state, head, used);
        drop(state);
        if let Err(fault) = answered {
            self.fail(name, &fault);
        }
    }

    /// Calls `serve` without the lock, and counts this worker as busy.
    fn busy<'s, T>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        serve: impl FnOnce() -> T,
    ) -> (MutexGuard<'s, State>, T) {
        state.busy += 1;
        state.taken = state.taken.wrapping_add(1);
        if state.is_stuck() {
            self.wake_supervisor(&mut state);
        }
        drop(state);
        let result = serve();
        let mut state = self.lock();
        state.busy -= 1;
        if state.busy == 0 && state.paused {
            self.changed.notify_all();
        }
        (state, result)
    }

    fn answer(&self, state: &mut State, head: u16, used: u32) -> Result<(), QueueFault> {
        state.queue.push(&self.memory, head, used)?;
        state.queue.flush(&self.memory, &*self.interrupt)
    }

    fn wake_supervisor(&self, state: &mut State) {
        if std::mem::take(&mut state.supervisor_waits) {
            self.supervise.notify_one();
        }
    }

    /// Calls `add_worker` when all workers hang, until the session ends. `add_worker` returns whether it has added a
    /// worker. Also wakes a worker when requests of a stuck group have to be refused.
    pub fn supervise(&self, name: &str, mut add_worker: impl FnMut() -> bool) {
        let mut state = self.lock();
        let mut delay = GROW_DELAY;
        while !state.stopped {
            if !state.is_stuck() {
                delay = GROW_DELAY;
                // The wait ends early if all workers hang.
                state.supervisor_waits = true;
                let retry;
                (state, retry) = if state.groups.has_excess() {
                    let (state, waited) = wait_timeout(&self.supervise, state, RETRY_DELAY);
                    (state, waited.timed_out())
                } else {
                    (wait(&self.supervise, state), false)
                };
                state.supervisor_waits = false;
                if retry && state.groups.has_excess() && state.idle > 0 {
                    drop(state);
                    self.notify_one(name);
                    state = self.lock();
                }
                continue;
            }
            let taken = state.taken;
            (state, _) = wait_timeout(&self.supervise, state, delay);
            if !state.stopped && state.is_stuck() && state.taken == taken {
                drop(state);
                delay = if add_worker() { GROW_DELAY } else { RETRY_DELAY };
                state = self.lock();
            }
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

/// The right to end a request after [`Handler::serve`] has returned.
pub struct Later<'a> {
    session: &'a Arc<Session>,
    head: u16,
    name: &'static str,
}

impl<'a> Later<'a> {
    /// Returns the right to end the request whose chain has this head. `name` is the handler's name, for log lines.
    pub fn new(session: &'a Arc<Session>, head: u16, name: &'static str) -> Self {
        Self { session, head, name }
    }

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
        self.session.end_kept(self.name, self.head, write);
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
