//! The device loop: one thread that serves every device's events, and runs closures for other threads in between.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};

use crate::child::Reporter;
use crate::control::{ExitReason, chain};
use crate::virtio::mmio::SharedDevice;

/// Stack of the loop's thread.
const STACK: usize = 256 << 10;

/// Why the loop failed.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// Epoll or eventfd could not be made.
    #[error("cannot set up the device loop")]
    Setup(#[source] event_manager::Error),
    /// The thread could not be made.
    #[error("cannot start the device loop")]
    Thread(#[source] io::Error),
    /// The loop does not answer any more.
    #[error("the device loop is gone")]
    Gone(#[source] event_manager::Error),
    /// It has no such device.
    #[error("the device loop knows no device {0}")]
    Unknown(u32),
    /// It was gone while pausing.
    #[error("the device loop did not pause")]
    NotPaused,
}

/// The loop, seen from outside.
pub struct EventLoop {
    endpoint: RemoteEndpoint<SharedDevice>,
    /// What the loop knows the devices of its start by, in their order, once somebody wants to know.
    first: Receiver<SubscriberId>,
    known: Vec<SubscriberId>,
    /// While there, the loop stands still; dropping it lets the loop go on.
    paused: Option<Sender<()>>,
}

impl EventLoop {
    /// Starts the loop's thread.
    ///
    /// # Errors
    /// [`LoopError`].
    pub fn start(devices: Vec<SharedDevice>, reporter: std::sync::Arc<Reporter>) -> Result<Self, LoopError> {
        let mut manager = EventManager::<SharedDevice>::new().map_err(LoopError::Setup)?;
        let endpoint = manager.remote_endpoint();
        let (id, first) = channel();
        std::thread::Builder::new()
            .name("devices".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                for device in devices {
                    // Nobody wants to know of a machine that is gone.
                    let _ = id.send(manager.add_subscriber(device));
                }
                loop {
                    if let Err(error) = manager.run() {
                        reporter.exit(ExitReason::Failed(format!("device loop: {}", chain(&error))));
                    }
                }
            })
            .map_err(LoopError::Thread)?;
        Ok(Self { endpoint, first, known: Vec::new(), paused: None })
    }

    /// Adds a device.
    ///
    /// # Errors
    /// [`LoopError::Gone`].
    pub fn add(&self, device: SharedDevice) -> Result<SubscriberId, LoopError> {
        self.endpoint.call_blocking(move |loop_| Ok(loop_.add_subscriber(device))).map_err(LoopError::Gone)
    }

    /// Removes a device that was added.
    ///
    /// # Errors
    /// [`LoopError::Gone`].
    pub fn remove(&self, device: SubscriberId) -> Result<(), LoopError> {
        self.endpoint.call_blocking(move |loop_| loop_.remove_subscriber(device).map(drop)).map_err(LoopError::Gone)
    }

    /// Removes the device of this place among those of the start.
    ///
    /// # Errors
    /// [`LoopError`].
    pub fn remove_first(&mut self, place: u32) -> Result<(), LoopError> {
        self.known.extend(self.first.try_iter());
        let device = *self.known.get(place as usize).ok_or(LoopError::Unknown(place))?;
        self.remove(device)
    }

    /// Runs a closure on the loop, without waiting for it.
    ///
    /// # Errors
    /// [`LoopError::Gone`].
    pub fn run(&self, closure: impl FnOnce() + Send + 'static) -> Result<(), LoopError> {
        self.endpoint.fire(move |_| closure()).map_err(LoopError::Gone)
    }

    /// Makes the loop stand still between two events, and returns when it does.
    ///
    /// # Errors
    /// [`LoopError`].
    pub fn pause(&mut self) -> Result<(), LoopError> {
        if self.paused.is_some() {
            return Ok(());
        }
        let (stands, standing) = channel();
        let (go_on, wait) = channel::<()>();
        self.run(move || {
            let _ = stands.send(());
            // Ends with an error when the other side is dropped: that is the signal.
            let _ = wait.recv();
        })?;
        standing.recv().map_err(|_| LoopError::NotPaused)?;
        self.paused = Some(go_on);
        Ok(())
    }

    /// Whether it stands still.
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Lets the loop go on.
    pub fn resume(&mut self) {
        self.paused = None;
    }
}
