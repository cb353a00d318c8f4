//! The threads that serve requests, from the queue straight to the file system and back.
//!
//! Idle threads wait for the queue's notification, of which the kernel wakes one (EPOLLEXCLUSIVE). A thread that takes a
//! request while others idle asks to be notified of the next, or passes the notification on when there is one already.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::request::serve;
use crate::virtio::device::{GuestMemory, Interrupt};
use crate::virtio::queue::{QueueFault, Vq, chain_of_causes};

/// A request's path through the file system is shallow, and its buffers are on the heap.
const STACK: usize = 256 * 1024;

struct Shared {
    server: Arc<Server<PassthroughFs>>,
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
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts them.
    ///
    /// # Errors
    /// The error of making an eventfd or a thread.
    pub fn start(
        count: u8,
        paused: bool,
        server: Arc<Server<PassthroughFs>>,
        memory: Arc<GuestMemory>,
        queue: Vq,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            server,
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
        std::thread::Builder::new().name(format!("fs{number}")).stack_size(STACK).spawn(move || {
            // SAFETY: takes flags; this thread gets a working directory of its own, which the file system changes for
            // operations on extended attributes.
            if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
                log::error!("virtio-fs: cannot unshare the working directory: {}", io::Error::last_os_error());
                return;
            }
            shared.run(&epoll);
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
            log::error!("virtio-fs: cannot stop the workers: {error}");
        }
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("virtio-fs: a worker panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify_one(&self) {
        if let Err(error) = self.notify.write(1) {
            log::error!("virtio-fs: cannot pass a notification on: {error}");
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
                log::error!("virtio-fs: a worker cannot wait: {error}");
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
            let Some((chain, raw)) = taken else {
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
            let head = chain.head;
            let used = serve(&self.server, &self.memory, chain, raw);
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
            log::error!("virtio-fs: requests stopped: {}", chain_of_causes(fault));
            if let Err(error) = self.interrupt.needs_reset() {
                log::error!("virtio-fs: cannot ask for a reset: {error}");
            }
        }
    }
}
