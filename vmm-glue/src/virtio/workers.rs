//! Worker threads of a device whose requests can block. A worker pops a request, calls the handler and returns the
//! result.
//!
//! Idle workers wait for the queue's notification, and the kernel wakes one of them (EPOLLEXCLUSIVE). A worker that
//! takes a request while others are idle enables the next notification. If there is another request already, it signals
//! the notification itself.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use husk_base::error::chain;
use husk_base::sync::{lock, wait};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Interrupt;
use super::queue::{Chain, QueueFault, Virtqueue};
use crate::guest_memory::GuestMemory;

/// Stack size of a worker. Handlers are not nested deeply, and their buffers are on the heap.
const STACK: usize = 256 * 1024;

/// Serves a device's requests.
pub trait Handler: Send + Sync + 'static {
    /// Name for threads and log lines.
    const NAME: &'static str;
    /// Prepares a worker thread; called once on each. The thread ends on an error.
    ///
    /// # Errors
    /// The error of a preparation without which the thread cannot work.
    fn prepare_thread(&self) -> io::Result<()> {
        Ok(())
    }
    /// Serves one request. Returns the number of bytes written to the chain.
    fn serve(&self, memory: &GuestMemory, request: Chain<'_>) -> u32;
}

struct Shared<H> {
    handler: Arc<H>,
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
    paused: bool,
    stopped: bool,
    /// Whether the driver broke the queue. Then no more requests are taken from it.
    failed: bool,
}

/// The worker threads of one activation.
pub struct Workers<H: Handler> {
    shared: Arc<Shared<H>>,
    threads: Vec<JoinHandle<()>>,
}

impl<H: Handler> Workers<H> {
    /// Starts the worker threads.
    pub fn start(
        count: u8,
        paused: bool,
        handler: Arc<H>,
        memory: Arc<GuestMemory>,
        queue: Virtqueue,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            handler,
            memory,
            interrupt,
            notify: queue.notify_eventfd().try_clone()?,
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            state: Mutex::new(State { queue, idle: 0, busy: 0, paused, stopped: false, failed: false }),
            changed: Condvar::new(),
        });
        let mut this = Self { shared, threads: Vec::with_capacity(count.into()) };
        for number in 0..count {
            match this.spawn(number) {
                Ok(thread) => this.threads.push(thread),
                Err(error) => {
                    this.stop();
                    return Err(error);
                }
            }
        }
        Ok(this)
    }

    fn spawn(&self, number: u8) -> io::Result<JoinHandle<()>> {
        let epoll = Epoll::new()?;
        for (event, set) in
            [(&self.shared.notify, EventSet::IN | EventSet::EXCLUSIVE), (&self.shared.stop, EventSet::IN)]
        {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(set, 0))?;
        }
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new().name(format!("{}{number}", H::NAME)).stack_size(STACK).spawn(move || {
            match shared.handler.prepare_thread() {
                Ok(()) => shared.run(&epoll),
                Err(error) => log::error!("{}: failed to prepare a worker thread: {error}", H::NAME),
            }
        })
    }

    /// Returns when no request is being served, and none will be until [`Workers::resume`].
    pub fn pause(&self) {
        let mut state = self.shared.lock();
        state.paused = true;
        while state.busy > 0 {
            state = wait(&self.shared.changed, state);
        }
    }

    /// Resumes serving.
    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
        // A thread that waits for a notification may have missed one during the pause.
        self.shared.notify_one();
    }

    /// Stops the threads. Returns when the last request is complete.
    pub fn stop(self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("{}: failed to stop the worker threads: {error}", H::NAME);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("{}: a worker thread panicked", H::NAME);
            }
        }
    }
}

impl<H: Handler> Shared<H> {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn notify_one(&self) {
        if let Err(error) = self.notify.write(1) {
            log::error!("{}: failed to signal the queue's notification: {error}", H::NAME);
        }
    }

    fn run(&self, epoll: &Epoll) {
        loop {
            match self.serve_until_empty() {
                Ok(true) => {}
                Ok(false) => return,
                Err(fault) => self.fail(&fault),
            }
            let mut event = [EpollEvent::default()];
            if let Err(error) = epoll.wait(-1, &mut event)
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("{}: failed to wait for notifications: {error}", H::NAME);
                return;
            }
            // Fails with EAGAIN if another thread has cleared it.
            let _ = self.notify.read();
            self.lock().idle -= 1;
        }
    }

    /// Serves requests until there are none, and then counts this thread as idle. Returns false if the thread must end.
    fn serve_until_empty(&self) -> Result<bool, QueueFault> {
        let mut state = self.lock();
        loop {
            while state.paused && !state.stopped {
                state = wait(&self.changed, state);
            }
            if state.stopped {
                return Ok(false);
            }
            let popped = if state.failed { None } else { state.queue.pop(&self.memory)? };
            let Some(request) = popped else {
                if !state.failed && state.queue.enable_notification(&self.memory)? {
                    continue;
                }
                state.idle += 1;
                return Ok(true);
            };
            if state.idle > 0 && state.queue.enable_notification(&self.memory)? {
                self.notify_one();
            }
            state.busy += 1;
            drop(state);
            let head = request.head;
            let used = self.handler.serve(&self.memory, request);
            state = self.lock();
            state.busy -= 1;
            if state.busy == 0 {
                self.changed.notify_all();
            }
            state.queue.push(&self.memory, head, used)?;
            state.queue.flush(&self.memory, &*self.interrupt)?;
        }
    }

    fn fail(&self, fault: &QueueFault) {
        let mut state = self.lock();
        state.idle += 1;
        if !std::mem::replace(&mut state.failed, true) {
            log::error!("{}: stopped serving requests: {}", H::NAME, chain(fault));
            if let Err(error) = self.interrupt.needs_reset() {
                log::error!("{}: failed to request a reset: {error}", H::NAME);
            }
        }
    }
}
