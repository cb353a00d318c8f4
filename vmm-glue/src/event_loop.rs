//! The device loop: one thread that serves the events of all devices, and runs closures for other threads between
//! events.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};
use husk_base::error::chain;

use crate::control::ExitReason;
use crate::jail::{Kind, confine};
use crate::reporter::Reporter;
use crate::virtio::mmio::SharedDevice;

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

/// Handle to the device loop, for other threads.
pub struct EventLoop {
    endpoint: RemoteEndpoint<SharedDevice>,
    /// Receives the ids of the boot devices, in the order of the devices. The channel is read when an id is needed.
    boot_ids: Receiver<SubscriberId>,
    boot_devices: Vec<SubscriberId>,
    /// The device loop is paused while this sender exists. Dropping the sender resumes the loop.
    paused: Option<Sender<()>>,
}

impl EventLoop {
    /// Starts the device loop's thread.
    pub fn start(devices: Vec<SharedDevice>, reporter: std::sync::Arc<Reporter>) -> Result<Self, LoopError> {
        let mut manager = EventManager::<SharedDevice>::new().map_err(LoopError::Setup)?;
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
        Ok(Self { endpoint, boot_ids, boot_devices: Vec::new(), paused: None })
    }

    /// Adds a device.
    pub fn add(&self, device: SharedDevice) -> Result<SubscriberId, LoopError> {
        self.endpoint.call_blocking(move |loop_| Ok(loop_.add_subscriber(device))).map_err(LoopError::Gone)
    }

    /// Removes a device that [`Self::add`] has added.
    pub fn remove(&self, device: SubscriberId) -> Result<(), LoopError> {
        self.endpoint.call_blocking(move |loop_| loop_.remove_subscriber(device).map(drop)).map_err(LoopError::Gone)
    }

    /// Removes a boot device, by its index in the list given to [`Self::start`].
    pub fn remove_boot_device(&mut self, index: u32) -> Result<(), LoopError> {
        self.boot_devices.extend(self.boot_ids.try_iter());
        let device = *self.boot_devices.get(index as usize).ok_or(LoopError::Unknown(index))?;
        self.remove(device)
    }

    /// Runs a closure on the device loop. Does not wait until the closure has run.
    pub fn run(&self, closure: impl FnOnce() + Send + 'static) -> Result<(), LoopError> {
        self.endpoint.fire(move |_| closure()).map_err(LoopError::Gone)
    }

    /// Pauses the device loop between two events. Returns when it has paused.
    pub fn pause(&mut self) -> Result<(), LoopError> {
        if self.paused.is_some() {
            return Ok(());
        }
        let (paused_tx, paused_rx) = channel();
        let (resume_tx, resume_rx) = channel::<()>();
        self.run(move || {
            let _ = paused_tx.send(());
            // The device loop resumes when `recv` returns. `recv` returns an error when `paused` is dropped.
            let _ = resume_rx.recv();
        })?;
        paused_rx.recv().map_err(|_| LoopError::NotPaused)?;
        self.paused = Some(resume_tx);
        Ok(())
    }

    /// Returns whether the device loop is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Resumes the device loop.
    pub fn resume(&mut self) {
        self.paused = None;
    }
}
