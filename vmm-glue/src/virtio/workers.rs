//! Threads of a device whose requests block: from the queue straight to the handler and back.
//!
//! Idle threads wait for the queue's notification, of which the kernel wakes one (EPOLLEXCLUSIVE). A thread that takes a
//! request while others idle asks to be notified of the next, or passes the notification on when there is one already.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{GuestMemory, Interrupt};
use super::queue::{QueueFault, Taken, Vq, chain_of_causes};

/// Handlers are shallow, and their buffers are on the heap.
const STACK: usize = 256 * 1024;

/// What serves a device's requests.
pub trait Handler: Send + Sync + 'static {
    /// For thread names and log lines.
    const NAME: &'static str;
    /// Once on each thread; the thread ends on an error.
    ///
    /// # Errors
    /// What the thread cannot work without.
    fn prepare_thread(&self) -> io::Result<()> {
        Ok(())
    }
    /// Serves one request; returns how many bytes were written to the chain.
    fn serve(&self, memory: &GuestMemory, request: Taken<'_>) -> u32;
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
    queue: Vq,
    /// Threads that wait for a notification.
    idle: usize,
    /// Requests being served.
    busy: usize,
    paused: bool,
    stopped: bool,
    /// The driver broke the queue: nothing more is taken from it.
    failed: bool,
}

/// The threads of one activation.
pub struct Workers<H: Handler> {
    shared: Arc<Shared<H>>,
    threads: Vec<JoinHandle<()>>,
}

impl<H: Handler> Workers<H> {
    /// Starts them.
    pub fn start(
        count: u8,
        paused: bool,
        handler: Arc<H>,
        memory: Arc<GuestMemory>,
        queue: Vq,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            handler,
            memory,
            interrupt,
            notify: queue.notify_event().try_clone()?,
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
                Err(error) => log::error!("{}: cannot prepare a worker: {error}", H::NAME),
            }
        })
    }

    /// Returns when no request is being served, and none is until [`Workers::resume`].
    pub fn quiesce(&self) {
        let mut state = self.shared.lock();
        state.paused = true;
        while state.busy > 0 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Serves again.
    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
        // Who waits for a notification may have missed one while paused.
        self.shared.notify_one();
    }

    /// Ends the threads; returns when the last request is done.
    pub fn stop(self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("{}: cannot stop the workers: {error}", H::NAME);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("{}: a worker panicked", H::NAME);
            }
        }
    }
}

impl<H: Handler> Shared<H> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify_one(&self) {
        if let Err(error) = self.notify.write(1) {
            log::error!("{}: cannot pass a notification on: {error}", H::NAME);
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
                log::error!("{}: a worker cannot wait: {error}", H::NAME);
                return;
            }
            // Would block when another thread was quicker.
            let _ = self.notify.read();
            self.lock().idle -= 1;
        }
    }

    /// Serves requests until there is none, then counts this thread as idle; false when it is to end.
    fn serve_until_empty(&self) -> Result<bool, QueueFault> {
        let mut state = self.lock();
        loop {
            while state.paused && !state.stopped {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopped {
                return Ok(false);
            }
            let taken = if state.failed { None } else { state.queue.pop_with_raw(&self.memory)? };
            let Some(request) = taken else {
                if !state.failed && state.queue.listen(&self.memory)? {
                    continue;
                }
                state.idle += 1;
                return Ok(true);
            };
            if state.idle > 0 && state.queue.listen(&self.memory)? {
                self.notify_one();
            }
            state.busy += 1;
            drop(state);
            let head = request.0.head;
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
            log::error!("{}: requests stopped: {}", H::NAME, chain_of_causes(fault));
            if let Err(error) = self.interrupt.needs_reset() {
                log::error!("{}: cannot ask for a reset: {error}", H::NAME);
            }
        }
    }
}
