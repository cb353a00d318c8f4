//! A built machine: what the control socket asks of it.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{BlkConfig, NetConfig};
use crate::event_loop::{EventLoop, LoopError};
use crate::vcpu::Vcpus;
use crate::virtio::device::GuestMemory;
use crate::virtio::slots::{PlugError, Slots};
use crate::virtio::vsock::{self, Vsock};

/// Why a machine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It is paused, and this needs its device loop.
    #[error("the machine is paused")]
    Paused,
    /// The device loop failed.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The device could not be plugged in.
    #[error(transparent)]
    Plug(#[from] PlugError),
}

/// The machine.
pub struct Vm {
    vcpus: Vcpus,
    event_loop: EventLoop,
    slots: Arc<Slots>,
    vsock: Arc<Mutex<Vsock>>,
    running: bool,
    /// Last, because everything above uses it until the process ends.
    _memory: GuestMemory,
}

impl Vm {
    pub(crate) fn new(
        vcpus: Vcpus,
        event_loop: EventLoop,
        slots: Arc<Slots>,
        vsock: Arc<Mutex<Vsock>>,
        memory: GuestMemory,
    ) -> Self {
        Self { vcpus, event_loop, slots, vsock, running: false, _memory: memory }
    }

    /// Lets device loop and vCPUs run.
    pub fn resume(&mut self) {
        self.event_loop.resume();
        self.vcpus.resume();
        self.running = true;
    }

    /// Stops the vCPUs, then the device loop; returns when all stand still.
    ///
    /// # Errors
    /// [`VmError::Loop`].
    pub fn pause(&mut self) -> Result<(), VmError> {
        if self.running {
            self.vcpus.pause();
            self.running = false;
        }
        Ok(self.event_loop.pause()?)
    }

    /// Opens a stream to a port of the guest; `reply` gets it when the guest has accepted.
    pub fn connect(&self, port: u32, reply: vsock::Reply) {
        self.vsock.lock().unwrap_or_else(PoisonError::into_inner).connect(port, reply);
    }
}
