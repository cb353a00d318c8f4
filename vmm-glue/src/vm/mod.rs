//! A built VM and the operations that the control socket requests.

mod devices;
mod save;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

use husk_base::sync::lock;
use kvm_ioctls::VmFd;

use crate::arch::kaslr;
use crate::config::{BlkConfig, NetConfig};
use crate::config_check::{self, ConfigError};
use crate::control::{PageKind, VcpuPlace};
use crate::event_loop::LoopError;
use crate::guest_memory::GuestMemory;
use crate::memory::MemoryError;
use crate::memory::hotplug::HotplugRange;
use crate::reporter::Reporter;
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::mem::{Mem, OnSizeReached};
use crate::virtio::net::{Backend, Net, OfferError, RequestVhost};
use crate::virtio::slots::{PlugError, Purpose};
use crate::virtio::vsock::{self, Vsock};
use crate::vmgenid::VmGenId;

pub(crate) use devices::Devices;
pub use save::SaveError;
pub(crate) use save::Saver;

/// Why an operation on a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The VM is paused, and the operation needs the device loop or the vCPUs.
    #[error("failed to change the VM: the VM is paused and must be resumed first")]
    Paused,
    /// The device loop failed.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The device could not be plugged into a slot.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// The device's configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The request for a disk or a connection does not carry exactly one fd.
    #[error("failed to check the fds of the request: exactly one fd is required, but {0} were received")]
    Fds(usize),
    /// The interface could not be created.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No interface with this MAC address waits for vhost-net.
    #[error("failed to start vhost-net: no interface with MAC address {0:02x?} waits for it")]
    NoVhostRequest([u8; 6]),
    /// The interface cannot use vhost-net.
    #[error(transparent)]
    Vhost(#[from] OfferError),
    /// The disk could not be set up.
    #[error("failed to set up the disk")]
    Disk(#[from] BlkError),
    /// The VM has no balloon.
    #[error("failed to set the balloon's target: the VM has no balloon")]
    NoBalloon,
    /// The guest could not be notified.
    #[error("failed to notify the guest of the balloon's target")]
    Balloon(#[source] io::Error),
    /// The vCPUs could not be hot-plugged.
    #[error("failed to hot-plug vCPUs")]
    Vcpus(#[from] VcpuError),
    /// No addresses were reserved for this kind of memory, or the memory's device is not attached.
    #[error("failed to hot-plug memory: the VM has no memory device for pages of kind {0:?}")]
    NoMemoryDevice(PageKind),
    /// The memory could not be registered with KVM.
    #[error("failed to hot-plug memory")]
    Memory(#[from] MemoryError),
    /// The memory device could not be created.
    #[error("failed to create the memory device")]
    CreateMem(#[source] io::Error),
    /// The guest could not be notified of the new requested size of the memory device.
    #[error("failed to notify the guest of the memory device's new requested size")]
    NotifyMem(#[source] io::Error),
}

/// A VM.
pub struct Vm {
    pub(crate) vcpus: Vcpus,
    pub(crate) devices: Devices,
    pub(crate) vsock: Arc<Mutex<Vsock>>,
    pub(crate) balloon: Option<Arc<Mutex<Balloon>>>,
    pub(crate) hotplug_memory: HotplugMemory,
    pub(crate) hotplug_huge_pages: HotplugMemory,
    pub(crate) kvm: Arc<VmFd>,
    /// Number of bytes by which the guest's kernel was moved.
    pub(crate) kernel_moved: u64,
    pub(crate) interfaces: Interfaces,
    /// `None` if the VM cannot be saved.
    pub(crate) saver: Option<Saver>,
    pub(crate) _vmgenid: VmGenId,
    pub(crate) running: bool,
    /// This field must be the last, so that it is dropped last. All fields above use guest memory until the process
    /// ends.
    pub(crate) memory: GuestMemory,
}

/// Error of creating an interface.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The tap could not be set up.
    #[error("failed to set up the tap")]
    Tap(#[source] io::Error),
    /// The timer of the rate limits could not be created.
    #[error("failed to create the timer of the interface's rate limits")]
    RateLimits(#[source] io::Error),
}

/// The VM's network interfaces.
pub(crate) struct Interfaces {
    reporter: Arc<Reporter>,
    devices: Vec<Weak<Mutex<Net>>>,
}

impl Interfaces {
    /// Creates an empty list of interfaces. Interfaces that are created later request vhost-net from the shim through
    /// `reporter`.
    pub fn new(reporter: Arc<Reporter>) -> Self {
        Self { reporter, devices: Vec::new() }
    }

    /// Creates an interface's device.
    ///
    /// # Errors
    /// [`InterfaceError`].
    pub fn create(&mut self, config: &NetConfig, taps: Vec<File>) -> Result<Arc<Mutex<Net>>, InterfaceError> {
        let (reporter, mac) = (Arc::clone(&self.reporter), config.mac);
        let request = move || reporter.request_vhost(mac);
        let vhost = config.vhost.then(|| Box::new(request) as RequestVhost);
        let mut net = Net::new(Backend { taps, vhost }, mac, config.mtu).map_err(InterfaceError::Tap)?;
        net.limit_rates(config.receive_rate_limit, config.transmit_rate_limit).map_err(InterfaceError::RateLimits)?;
        let device = Arc::new(Mutex::new(net));
        // Forget the devices that were hot-unplugged.
        self.devices.retain(|device| device.strong_count() > 0);
        self.devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    fn waiting_for_vhost(&self, mac: [u8; 6]) -> Option<Arc<Mutex<Net>>> {
        self.devices.iter().filter_map(Weak::upgrade).find(|device| lock(device).waits_for_vhost(mac))
    }
}

/// State of one kind of hot-plugged memory.
pub(crate) enum HotplugMemory {
    /// This kind of memory cannot be hot-plugged.
    None,
    /// The memory's addresses are reserved, but its device does not exist yet.
    Reserved(HotplugRange),
    /// The memory's device exists, but it has no slot, because attaching it failed.
    Detached(Arc<Mutex<Mem>>),
    /// The memory's device is attached. The fields are the slot's number and the device.
    Attached(u32, Arc<Mutex<Mem>>),
}

impl HotplugMemory {
    /// Returns the device, and creates it first if it does not exist. Returns `None` if this kind of memory cannot be
    /// hot-plugged.
    ///
    /// # Errors
    /// The call fails if the device cannot be created. In this case, the addresses stay reserved.
    fn device(&mut self) -> io::Result<Option<Arc<Mutex<Mem>>>> {
        let (state, device) = match std::mem::replace(self, Self::None) {
            Self::Reserved(range) => match Mem::new(range) {
                Ok(device) => {
                    let device = Arc::new(Mutex::new(device));
                    (Self::Detached(device.clone()), Ok(Some(device)))
                }
                Err((range, error)) => (Self::Reserved(range), Err(error)),
            },
            Self::Detached(device) => (Self::Detached(device.clone()), Ok(Some(device))),
            Self::Attached(slot, device) => (Self::Attached(slot, device.clone()), Ok(Some(device))),
            Self::None => (Self::None, Ok(None)),
        };
        *self = state;
        device
    }
}

impl Vm {
    /// Resumes the device loop and the vCPUs.
    pub fn resume(&mut self) {
        self.devices.resume();
        self.vcpus.resume();
        self.running = true;
    }

    /// Stops the vCPUs, then the devices' own threads, and then the device loop. Returns when all these threads have
    /// stopped.
    pub fn pause(&mut self) -> Result<(), VmError> {
        if self.running {
            self.vcpus.pause();
            self.running = false;
        }
        self.devices.pause()
    }

    /// Returns where each vCPU is: the address of its next instruction, in the kernel's image if it is in the kernel.
    /// `None` stands for a vCPU that did not stop in time. Stops the vCPUs for a moment.
    ///
    /// # Errors
    /// [`VmError::Paused`].
    pub fn inspect(&self) -> Result<Vec<Option<VcpuPlace>>, VmError> {
        if !self.running {
            return Err(VmError::Paused);
        }
        let in_image = |place: VcpuPlace| VcpuPlace {
            address: kaslr::address_in_image(place.address, self.kernel_moved),
            ..place
        };
        Ok(self.vcpus.inspect().into_iter().map(|place| place.map(in_image)).collect())
    }

    /// Opens a vsock connection to a port in the guest. `fds` must be one stream socket. The client has the other end.
    /// `reply` is called when the guest has accepted or refused the connection.
    ///
    /// # Errors
    /// [`VmError`] if `fds` is not one socket. After an error, `reply` is dropped and not called.
    pub fn connect(&self, port: u32, fds: Vec<OwnedFd>, reply: vsock::Reply) -> Result<(), VmError> {
        lock(&self.vsock).connect(port, socket(fds)?, reply);
        Ok(())
    }

    /// Hot-plugs a network interface into a spare slot and returns the slot's number.
    pub fn attach_net(&mut self, config: &NetConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let mut fds = config_check::Fds::new(fds);
        let taps = config_check::net(config, &mut fds)?;
        fds.reject_unused()?;
        let device = self.interfaces.create(config, taps)?;
        self.devices.attach(device, Purpose::Any)
    }

    /// Gives the interface with this MAC address the vhost-net that it has requested: one fd for each queue pair.
    pub fn start_vhost(&self, mac: [u8; 6], fds: Vec<OwnedFd>) -> Result<(), VmError> {
        let files = config_check::vhost(fds)?;
        let interface = self.interfaces.waiting_for_vhost(mac).ok_or(VmError::NoVhostRequest(mac))?;
        Ok(lock(&interface).offer_vhost(files)?)
    }

    /// Hot-plugs a disk into a spare slot and returns the slot's number.
    pub fn attach_blk(&mut self, config: &BlkConfig, fds: Vec<OwnedFd>) -> Result<u32, VmError> {
        let file = config_check::blk(config, single_fd(fds)?)?;
        let device = Blk::new(file, config.read_only, &config.serial, config.rate_limit)?;
        self.devices.attach(Arc::new(Mutex::new(device)), Purpose::Any)
    }

    /// Hot-unplugs a disk or an interface. Frees its slot and closes its fds. The guest should have stopped using the
    /// device, because requests that are in progress are not answered.
    pub fn detach(&mut self, slot: u32) -> Result<(), VmError> {
        self.devices.detach(slot)
    }

    /// Returns the slot of the interface with this MAC address, or `None` if no interface has this address.
    pub fn find_net(&self, mac: [u8; 6]) -> Option<u32> {
        self.devices.find_net(mac)
    }

    /// Requests that the guest gives back `mib` MiB in total.
    pub fn set_balloon(&self, mib: u64) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::NoBalloon)?;
        lock(balloon).set_target(mib).map_err(VmError::Balloon)
    }

    /// Creates vCPUs until the VM has `count` vCPUs. The guest has to start the new vCPUs.
    pub fn hotplug_vcpus(&mut self, count: u8) -> Result<(), VmError> {
        if !self.running {
            return Err(VmError::Paused);
        }
        Ok(self.vcpus.hotplug(count)?)
    }

    /// Hot-plugs the memory device into its reserved slot, unless the device is already attached. Returns the slot's
    /// number.
    pub fn attach_mem(&mut self, pages: PageKind) -> Result<u32, VmError> {
        self.devices.reject_paused()?;
        if let HotplugMemory::Attached(slot, _) = self.hotplug_memory(pages) {
            return Ok(*slot);
        }
        let device = self
            .hotplug_memory_mut(pages)
            .device()
            .map_err(VmError::CreateMem)?
            .ok_or(VmError::NoMemoryDevice(pages))?;
        let slot = self.devices.attach(device.clone(), Purpose::Memory)?;
        *self.hotplug_memory_mut(pages) = HotplugMemory::Attached(slot, device);
        Ok(slot)
    }

    /// Requests that the guest plugs or unplugs memory until `mib` MiB are plugged. When the guest has reached this
    /// size, or another size is requested, `reached` gets the number of plugged bytes.
    ///
    /// # Errors
    /// [`VmError`]. After an error, `reached` is dropped and not called.
    pub fn request_memory(&self, pages: PageKind, mib: u64, reached: OnSizeReached) -> Result<(), VmError> {
        let HotplugMemory::Attached(_, device) = self.hotplug_memory(pages) else {
            return Err(VmError::NoMemoryDevice(pages));
        };
        let bytes = mib.saturating_mul(1 << 20);
        let mut device = lock(device);
        let extent = device.extent(bytes);
        device.range().register(&self.kvm, extent)?;
        device.request(bytes, reached).map_err(VmError::NotifyMem)
    }

    /// Returns the number of plugged MiB.
    pub fn plugged_mib(&self, pages: PageKind) -> u64 {
        match self.hotplug_memory(pages) {
            HotplugMemory::Attached(_, device) => lock(device).plugged() >> 20,
            _ => 0,
        }
    }

    fn hotplug_memory(&self, pages: PageKind) -> &HotplugMemory {
        match pages {
            PageKind::Ordinary => &self.hotplug_memory,
            PageKind::Huge => &self.hotplug_huge_pages,
        }
    }

    fn hotplug_memory_mut(&mut self, pages: PageKind) -> &mut HotplugMemory {
        match pages {
            PageKind::Ordinary => &mut self.hotplug_memory,
            PageKind::Huge => &mut self.hotplug_huge_pages,
        }
    }
}

fn socket(fds: Vec<OwnedFd>) -> Result<OwnedFd, VmError> {
    Ok(config_check::connection(single_fd(fds)?)?)
}

fn single_fd(fds: Vec<OwnedFd>) -> Result<OwnedFd, VmError> {
    let count = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| VmError::Fds(count))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::hotplug::{Backing, reserve};

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn connection_needs_one_socket() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let (mut reader, pipe) = io::pipe().unwrap();
        let file = File::open("/dev/null").unwrap();
        let copy = OwnedFd::from(stream.try_clone().unwrap());
        assert!(matches!(socket(Vec::new()), Err(VmError::Fds(0))));
        assert!(matches!(socket(vec![copy, pipe.try_clone().unwrap().into()]), Err(VmError::Fds(2))));
        for other in [file.into(), pipe.into()] {
            let error = socket(vec![other]).unwrap_err();
            assert!(matches!(error, VmError::Config(ConfigError::Kind { .. })), "{error:?}");
        }
        drop(socket(vec![stream.into()]).unwrap());
        // The readers see the end only if every copy of the other end is closed.
        assert_eq!((client.read(&mut [0]).unwrap(), reader.read(&mut [0]).unwrap()), (0, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no mmap(PROT_NONE)")]
    fn memory_range_outlives_a_failed_attach() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let (_, range) = reserve(&memory, (4 << 30, 128 << 20), Backing::Ordinary).unwrap();
        let mut state = HotplugMemory::Reserved(range);
        let first = state.device().unwrap().unwrap();
        // The device has no slot. The next attempt gets the same device and therefore the same range.
        assert!(matches!(state, HotplugMemory::Detached(_)));
        assert!(Arc::ptr_eq(&first, &state.device().unwrap().unwrap()));
        assert!(HotplugMemory::None.device().unwrap().is_none());
    }
}
