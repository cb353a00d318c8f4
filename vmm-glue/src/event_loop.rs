//! The device loop: one thread that serves the events of all devices, and runs closures for other threads between
//! events.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};
use husk_base::error::chain;

use crate::control::ExitReason;
use crate::jail::{Kind, confine};
use crate::reporter::Reporter;
use crate::virtio::device::{self, SharedDevice};
use crate::virtio::loop_handle::LoopHandle;

/// Stack size of the device loop's thread in bytes.
const STACK: usize = 256 << 10;

/// Error of the device loop.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// An epoll instance or an eventfd could not be created.
    #[error("failed to set up the device loop")]
    Setup(#[source] event_manager::Error),
    /// The thread could not be started.
    #[error("failed to start the device loop")]
    Thread(#[source] io::Error),
    /// The device loop did not run a call, or the call failed.
    #[error("failed to run a call on the device loop")]
    Gone(#[source] event_manager::Error),
    /// The device loop does not have the device to remove.
    #[error("failed to remove boot device {0}: the device loop has no boot device with this index")]
    Unknown(u32),
    /// The device loop ended before it could pause.
    #[error("failed to pause the device loop")]
    NotPaused,
}

/// A device loop whose thread has not been started. Closures that other threads send to the loop run after the start.
pub struct PreparedLoop(EventManager<SharedDevice>);

/// Controls the device loop from another thread.
pub struct EventLoop {
    endpoint: RemoteEndpoint<SharedDevice>,
    /// Receives the ids of the boot devices, in the order of the devices. [`Self::remove_boot_device`] reads the
    /// channel.
    boot_ids: Receiver<SubscriberId>,
    boot_devices: Vec<SubscriberId>,
    /// The device loop is paused while this sender exists. Dropping the sender resumes the loop.
    paused: Option<Sender<()>>,
}

impl PreparedLoop {
    /// Creates the loop.
    pub fn new() -> Result<Self, LoopError> {
        EventManager::new().map(Self).map_err(LoopError::Setup)
    }

    /// Returns a handle to the loop.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle::new(self.0.remote_endpoint())
    }

    /// Starts the device loop's thread.
    pub fn start(self, devices: Vec<SharedDevice>, reporter: Arc<Reporter>) -> Result<EventLoop, LoopError> {
        let Self(mut manager) = self;
        let endpoint = manager.remote_endpoint();
        let (id_sender, boot_ids) = channel();
        std::thread::Builder::new()
            .name("devices".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                if let Err(error) = confine(Kind::DeviceLoop) {
                    reporter.exit(ExitReason::Failed(chain(&error)));
                }
                for device in devices {
                    // Sending fails only if the receiver was dropped with the VM. In this case, the ids are not needed.
                    let _ = id_sender.send(manager.add_subscriber(device));
                }
                loop {
                    if let Err(error) = manager.run() {
                        reporter.exit(ExitReason::Failed(format!("the device loop failed: {}", chain(&error))));
                    }
                }
            })
            .map_err(LoopError::Thread)?;
        Ok(EventLoop { endpoint, boot_ids, boot_devices: Vec::new(), paused: None })
    }
}

impl EventLoop {
    /// Adds a device.
    pub fn add(&self, device: SharedDevice) -> Result<SubscriberId, LoopError> {
        self.call(move |loop_| Ok(loop_.add_subscriber(device)))
    }

    /// Resets a device that [`Self::add`] has added, and removes it.
    pub fn remove(&self, id: SubscriberId) -> Result<(), LoopError> {
        self.call(move |loop_| {
            device::lock(loop_.subscriber_mut(id)?).reset();
            loop_.remove_subscriber(id).map(drop)
        })
    }

    /// Resets and removes a boot device, by its index in the list given to [`PreparedLoop::start`].
    pub fn remove_boot_device(&mut self, index: u32) -> Result<(), LoopError> {
        self.boot_devices.extend(self.boot_ids.try_iter());
        let device = *self.boot_devices.get(index as usize).ok_or(LoopError::Unknown(index))?;
        self.remove(device)
    }

    /// Runs a closure on the device loop, and waits for its result.
    fn call<T: Send + 'static>(
        &self,
        closure: impl FnOnce(&mut dyn SubscriberOps<Subscriber = SharedDevice>) -> Result<T, event_manager::Error>
        + Send
        + 'static,
    ) -> Result<T, LoopError> {
        self.endpoint.call_blocking(closure).map_err(LoopError::Gone)
    }

    /// Pauses `devices` between two events, and then pauses the device loop. Returns when the device loop has paused.
    pub fn pause(&mut self, devices: Vec<SharedDevice>) -> Result<(), LoopError> {
        if self.paused.is_some() {
            return Ok(());
        }
        let (paused_tx, paused_rx) = channel();
        let (resume_tx, resume_rx) = channel::<()>();
        let closure = move |_: &mut dyn SubscriberOps<Subscriber = SharedDevice>| {
            devices.iter().for_each(|device| device::lock(device).pause());
            let _ = paused_tx.send(());
            // The device loop resumes when `recv` returns. `recv` returns an error when `EventLoop::paused` is
            // dropped.
            let _ = resume_rx.recv();
            devices.iter().for_each(|device| device::lock(device).resume());
        };
        self.endpoint.fire(closure).map_err(LoopError::Gone)?;
        paused_rx.recv().map_err(|_| LoopError::NotPaused)?;
        self.paused = Some(resume_tx);
        Ok(())
    }

    /// Returns whether the device loop is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Resumes the devices and the device loop, but does not wait until the device loop has resumed.
    pub fn resume(&mut self) {
        self.paused = None;
    }
}
