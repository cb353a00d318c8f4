//! A built machine: what the control socket asks of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::check::{self, ConfigError};
use crate::config::{BlkConfig, NetConfig};
use crate::event_loop::{EventLoop, LoopError};
use crate::vcpu::Vcpus;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::device::GuestMemory;
use crate::virtio::mmio::{self, SharedDevice};
use crate::virtio::net::Net;
use crate::virtio::slots::{PlugError, Slots};
use crate::virtio::vsock::{self, Vsock};
use crate::vmgenid::VmGenId;

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
    /// The device's configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device's descriptor did not come, or more did.
    #[error("one descriptor is needed, {0} came")]
    Descriptors(usize),
    /// The tap cannot be used.
    #[error("cannot use the tap")]
    Tap(#[source] io::Error),
    /// The disk cannot be used.
    #[error("cannot use the disk")]
    Disk(#[from] BlkError),
    /// There is no balloon.
    #[error("the machine has no balloon")]
    NoBalloon,
    /// The guest could not be told.
    #[error("cannot tell the guest about the balloon")]
    Balloon(#[source] io::Error),
}

/// The machine.
pub struct Vm {
    vcpus: Vcpus,
    event_loop: EventLoop,
    slots: Arc<Slots>,
    vsock: Arc<Mutex<Vsock>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    /// To be renewed when a machine is restored from a snapshot.
    _vmgenid: VmGenId,
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
        balloon: Option<Arc<Mutex<Balloon>>>,
        vmgenid: VmGenId,
        memory: GuestMemory,
    ) -> Self {
        Self { vcpus, event_loop, slots, vsock, balloon, _vmgenid: vmgenid, running: false, _memory: memory }
    }

    /// Lets device loop and vCPUs run.
    pub fn resume(&mut self) {
        for device in self.slots.devices() {
            mmio::lock(device).resume();
        }
        self.event_loop.resume();
        self.vcpus.resume();
        self.running = true;
    }

    /// Stops the vCPUs, the device loop, and the devices' own threads, in this order; returns when all stand still.
    ///
    /// # Errors
    /// [`VmError::Loop`].
    pub fn pause(&mut self) -> Result<(), VmError> {
        if self.running {
            self.vcpus.pause();
            self.running = false;
        }
        self.event_loop.pause()?;
        for device in self.slots.devices() {
            mmio::lock(device).quiesce();
        }
        Ok(())
    }

    /// Opens a stream to a port of the guest; `reply` gets it when the guest has accepted.
    pub fn connect(&self, port: u32, reply: vsock::Reply) {
        self.vsock.lock().unwrap_or_else(PoisonError::into_inner).connect(port, reply);
    }

    /// Plugs a network interface into a spare slot and returns the slot's number.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn attach_net(&self, config: &NetConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let tap = check::net(config, one(fds)?)?;
        self.attach(Arc::new(Mutex::new(Net::new(tap, config.mac, config.mtu).map_err(VmError::Tap)?)))
    }

    /// Plugs a disk into a spare slot and returns the slot's number.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn attach_blk(&self, config: &BlkConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let file = check::blk(config, one(fds)?)?;
        self.attach(Arc::new(Mutex::new(Blk::new(file, config.read_only, &config.serial)?)))
    }

    /// Asks the guest for so many MiB in all.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn balloon(&self, mib: u64) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::NoBalloon)?;
        balloon.lock().unwrap_or_else(PoisonError::into_inner).set_target(mib).map_err(VmError::Balloon)
    }

    fn attach(&self, device: SharedDevice) -> Result<u32, VmError> {
        if self.event_loop.is_paused() {
            return Err(VmError::Paused); // the loop could not take the device
        }
        // The loop first: once in its slot, the guest may find the device at any moment.
        self.event_loop.add(device.clone())?;
        Ok(self.slots.plug(device)?)
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, VmError> {
    let count = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| VmError::Descriptors(count))?;
    Ok(fd)
}
