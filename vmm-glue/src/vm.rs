//! A built machine: what the control socket asks of it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::SubscriberId;
use kvm_ioctls::VmFd;

use crate::config::check::{self, ConfigError};
use crate::config::{BlkConfig, NetConfig};
use crate::control::Pages;
use crate::event_loop::{EventLoop, LoopError};
use crate::memory::MemoryError;
use crate::memory::hotplug::Hotplug;
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::device::GuestMemory;
use crate::virtio::mem::{Mem, Reached};
use crate::virtio::mmio::{self, SharedDevice};
use crate::virtio::net::Net;
use crate::virtio::slots::{PlugError, Purpose, Slots};
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
    /// The vCPUs did not come.
    #[error("cannot make vCPUs")]
    Vcpus(#[from] VcpuError),
    /// No memory of the kind was reserved, or its device is not attached, or could not be.
    #[error("the machine has no device for memory of pages of this kind: {0:?}")]
    NoGrowth(Pages),
    /// The memory cannot be had.
    #[error("cannot plug in memory")]
    Memory(#[from] MemoryError),
    /// Its device cannot be used.
    #[error("cannot use the memory device")]
    Mem(#[source] io::Error),
}

/// The machine.
pub struct Vm {
    pub(crate) vcpus: Vcpus,
    pub(crate) event_loop: EventLoop,
    pub(crate) slots: Arc<Slots>,
    /// What the loop knows the devices by that came later, by their slots.
    pub(crate) added: HashMap<u32, SubscriberId>,
    pub(crate) vsock: Arc<Mutex<Vsock>>,
    pub(crate) balloon: Option<Arc<Mutex<Balloon>>>,
    pub(crate) growth: Growth,
    pub(crate) huge: Growth,
    pub(crate) kvm: Arc<VmFd>,
    /// To be renewed when a machine is restored from a snapshot.
    pub(crate) _vmgenid: VmGenId,
    pub(crate) running: bool,
    /// Last, because everything above uses it until the process ends.
    pub(crate) _memory: GuestMemory,
}

/// Memory that may be plugged in.
pub(crate) enum Growth {
    /// There can be none.
    None,
    /// Its addresses are kept for it.
    Reserved(Hotplug),
    /// The device is there, in this slot.
    Attached(u32, Arc<Mutex<Mem>>),
}

impl Vm {
    /// Lets device loop and vCPUs run.
    pub fn resume(&mut self) {
        for device in self.slots.devices() {
            mmio::lock(&device).resume();
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
            mmio::lock(&device).quiesce();
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
    pub fn attach_net(&mut self, config: &NetConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let mut fds = check::Fds::new(fds);
        let backend = check::net(config, &mut fds)?;
        fds.used_up()?;
        let device = Net::new(backend, config.mac, config.mtu).map_err(VmError::Tap)?;
        self.attach(Arc::new(Mutex::new(device)), Purpose::Any)
    }

    /// Plugs a disk into a spare slot and returns the slot's number.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn attach_blk(&mut self, config: &BlkConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let file = check::blk(config, one(fds)?)?;
        self.attach(Arc::new(Mutex::new(Blk::new(file, config.read_only, &config.serial)?)), Purpose::Any)
    }

    /// Takes a disk or an interface out of its slot, which is free then, and closes what it had open. The guest had better
    /// be done with it: what it has asked of it is not answered.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn detach(&mut self, slot: u32) -> Result<(), VmError> {
        if self.event_loop.is_paused() {
            return Err(VmError::Paused);
        }
        // The slot first: from here on no vCPU starts it again.
        let device = self.slots.unplug(slot)?;
        mmio::lock(&device).reset();
        match self.added.remove(&slot) {
            Some(added) => self.event_loop.remove(added)?,
            None => self.event_loop.remove_first(slot)?,
        }
        Ok(())
    }

    /// The slot of the interface with this address, if there is one.
    pub fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        self.slots.find_net(mac)
    }

    /// Asks the guest for so many MiB in all.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn balloon(&self, mib: u64) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::NoBalloon)?;
        balloon.lock().unwrap_or_else(PoisonError::into_inner).set_target(mib).map_err(VmError::Balloon)
    }

    /// Makes vCPUs until there are so many, for the guest to start.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn grow_vcpus(&mut self, count: u8) -> Result<(), VmError> {
        if !self.running {
            return Err(VmError::Paused);
        }
        Ok(self.vcpus.grow(count)?)
    }

    /// Plugs the device that memory comes by into a slot kept for it, once, and returns the slot's number.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn attach_mem(&mut self, pages: Pages) -> Result<u32, VmError> {
        if self.event_loop.is_paused() {
            return Err(VmError::Paused);
        }
        let (slot, device) = match std::mem::replace(self.growth_mut(pages), Growth::None) {
            Growth::None => return Err(VmError::NoGrowth(pages)),
            Growth::Attached(slot, device) => (slot, device),
            Growth::Reserved(range) => {
                let device = Arc::new(Mutex::new(Mem::new(range).map_err(VmError::Mem)?));
                (self.attach(device.clone(), Purpose::Memory)?, device)
            }
        };
        *self.growth_mut(pages) = Growth::Attached(slot, device);
        Ok(slot)
    }

    /// Asks the guest to have so many MiB plugged in; `reached` learns how many bytes are once it has.
    ///
    /// # Errors
    /// [`VmError`]; `reached` is dropped then.
    pub fn request_memory(&self, pages: Pages, mib: u64, reached: Reached) -> Result<(), VmError> {
        let Growth::Attached(_, device) = self.growth(pages) else { return Err(VmError::NoGrowth(pages)) };
        let bytes = mib.saturating_mul(1 << 20);
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        let extent = device.extent(bytes);
        device.range().give_to(&self.kvm, extent)?;
        device.request(bytes, reached).map_err(VmError::Mem)
    }

    /// MiB plugged in at present.
    pub fn plugged_mib(&self, pages: Pages) -> u64 {
        match self.growth(pages) {
            Growth::Attached(_, device) => device.lock().unwrap_or_else(PoisonError::into_inner).plugged() >> 20,
            _ => 0,
        }
    }

    fn growth(&self, pages: Pages) -> &Growth {
        match pages {
            Pages::Ordinary => &self.growth,
            Pages::Huge => &self.huge,
        }
    }

    fn growth_mut(&mut self, pages: Pages) -> &mut Growth {
        match pages {
            Pages::Ordinary => &mut self.growth,
            Pages::Huge => &mut self.huge,
        }
    }

    fn attach(&mut self, device: SharedDevice, purpose: Purpose) -> Result<u32, VmError> {
        if self.event_loop.is_paused() {
            return Err(VmError::Paused); // the loop could not take the device
        }
        // The loop first: once in its slot, the guest may find the device at any moment.
        let added = self.event_loop.add(device.clone())?;
        match self.slots.plug(device, purpose) {
            Ok(slot) => {
                self.added.insert(slot, added);
                Ok(slot)
            }
            Err(error) => {
                // With what it has open: a disk of the node's is not held by a machine that did not take it.
                let _ = self.event_loop.remove(added);
                Err(error.into())
            }
        }
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, VmError> {
    let count = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| VmError::Descriptors(count))?;
    Ok(fd)
}
