//! Builds a VM from a checked configuration, in one function that lists the steps from top to bottom. After the last
//! step, the boot vCPU is at the kernel's entry point, and no vCPU runs yet.

mod kernel;
pub mod saved;

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use husk_base::error::chain;
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::GuestMemory as _;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::cpuid::CpuidConfig;
use crate::arch::kaslr::KaslrError;
use crate::arch::layout;
use crate::boot_timing::BootTiming;
use crate::bus::Bus;
use crate::config_check::{CheckedConfig, CheckedSource};
use crate::event_loop::{LoopError, PreparedLoop};
use crate::guest_memory::GuestMemory;
use crate::jail::Belongings;
use crate::memory::hotplug::Backing;
use crate::memory::{self, MemoryError, hotplug};
use crate::reporter::Reporter;
use crate::serial::Console;
use crate::snapshot::host::{Host, HostError};
use crate::snapshot::state::Machine;
use crate::snapshot::vcpu::{VcpuStateError, saved_msrs};
use crate::vcpu::factory::{CreateVcpuError, VcpuFactory};
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::device::{SharedDevice, VirtioDevice};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::rng::Rng;
use crate::virtio::slots::{PlugError, Purpose, Slots};
use crate::virtio::vsock::Vsock;
use crate::vm::{Devices, HotplugMemory, InterfaceError, Interfaces, Saver, Vm};
use crate::vmgenid::VmGenId;
use kernel::Kernel;
use saved::{RestoreError, Saved};

/// Error from building a VM.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The fd does not refer to KVM, or the host's kernel is too old.
    #[error("failed to use /dev/kvm: the device is not KVM with API version 12")]
    NotKvm,
    /// KVM lacks a capability that the VMM needs.
    #[error("failed to use /dev/kvm: this host's KVM lacks {0}")]
    Capability(&'static str),
    /// The configuration has more vCPUs than this host can run in one VM.
    #[error("failed to use /dev/kvm: {wanted} vCPUs were requested, but this host allows only {allowed}")]
    Vcpus {
        /// The configuration's `max_vcpus`.
        wanted: u8,
        /// KVM_CAP_MAX_VCPUS.
        allowed: usize,
    },
    /// A KVM ioctl failed.
    #[error("ioctl {0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// Guest memory could not be set up.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel image could not be loaded.
    #[error("failed to load the guest kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The kernel could not be moved to a random address.
    #[error(transparent)]
    Kaslr(#[from] KaslrError),
    /// A saved VM cannot go on.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The VM cannot be prepared for being saved.
    #[error("failed to prepare the vCPUs for being saved")]
    Saver(#[source] VcpuStateError),
    /// What KVM offers could not be read.
    #[error("failed to read what KVM offers")]
    Offered(#[from] HostError),
    /// The kernel and the initrd do not fit into guest memory.
    #[error("guest memory is too small for the kernel and the initrd, which end at {0} MiB")]
    TooSmall(u64),
    /// The initrd could not be read.
    #[error("failed to load the initrd")]
    Initrd(#[source] io::Error),
    /// Boot data could not be written.
    #[error("failed to write boot data to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
    /// The kernel command line is too long.
    #[error("the kernel command line is too long: it has {0} bytes, but at most 2047 bytes are allowed")]
    Cmdline(usize),
    /// The device tree could not be written.
    #[error("failed to write the device tree")]
    DeviceTree(#[source] vm_fdt::Error),
    /// A vCPU could not be created.
    #[error(transparent)]
    Vcpu(#[from] CreateVcpuError),
    /// A host resource could not be prepared.
    #[error("failed to prepare {0}")]
    Host(&'static str, #[source] io::Error),
    /// The share could not be set up.
    #[error("failed to set up the share")]
    Share(#[source] FsError),
    /// An interface could not be created.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// A device could not be plugged into a slot.
    #[error("failed to plug in {0}")]
    Plug(String, #[source] PlugError),
    /// A disk could not be set up.
    #[error("failed to set up the disk")]
    Disk(#[source] BlkError),
    /// The device loop could not be started.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The vCPU threads could not be started.
    #[error(transparent)]
    Threads(#[from] VcpuError),
}

/// What guest memory contains.
enum Content {
    Kernel(Kernel),
    Saved(Box<Saved>),
}

/// A VM that was built.
pub struct Built {
    /// The VM.
    pub vm: Vm,
    /// Why a saved VM does not go on. The kernel boots instead.
    pub refused: Option<RestoreError>,
}

/// Builds the VM. Its vCPUs do not run until [`Vm::resume`]. If a saved VM cannot go on, builds a VM that boots.
///
/// # Errors
/// [`BootError`].
pub fn build(checked: CheckedConfig, belongings: Belongings, reporter: &Arc<Reporter>) -> Result<Built, BootError> {
    let copied = |error| BootError::Host("the files for a boot without the saved VM", error);
    let otherwise = match checked.otherwise().map_err(copied)? {
        Some(otherwise) => Some((otherwise, belongings.try_clone().map_err(copied)?)),
        None => None,
    };
    match (build_once(checked, belongings, reporter), otherwise) {
        (Err(BootError::Restore(refused)), Some((checked, belongings))) => {
            log::warn!("the kernel boots, because a saved VM cannot go on: {}", chain(&refused));
            let vm = build_once(checked, belongings, reporter)?;
            Ok(Built { vm, refused: Some(refused) })
        }
        (built, _) => Ok(Built { vm: built?, refused: None }),
    }
}

fn build_once(checked: CheckedConfig, belongings: Belongings, reporter: &Arc<Reporter>) -> Result<Vm, BootError> {
    let mut timing = BootTiming::start();
    let CheckedConfig { config, memory: memory_size, kvm, source, console, net, blk } = checked;

    // Open KVM and check its capabilities.
    let kvm = open_kvm(kvm)?;
    check_capabilities(&kvm, config.max_vcpus)?;

    // Create an empty VM. KVM emulates the interrupt controllers and the timer, which must exist before the vCPUs.
    let vm = Arc::new(create_vm(&kvm)?);
    timing.step("KVM_CREATE_VM");
    vm.set_tss_address(layout::KVM_TSS).map_err(|error| BootError::Kvm("KVM_SET_TSS_ADDR", error))?;
    vm.create_irq_chip().map_err(|error| BootError::Kvm("KVM_CREATE_IRQCHIP", error))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(|error| BootError::Kvm("KVM_CREATE_PIT2", error))?;
    timing.step("interrupt controllers");

    // Map guest memory. Load the kernel, and then the initrd, into guest memory, or map the memory of a saved VM.
    let ram = memory::map(memory_size)?;
    let content = match source {
        CheckedSource::Kernel(files) => Content::Kernel(Kernel::load(files, &ram, &config, memory_size, &mut timing)?),
        CheckedSource::Saved { state, memory, build, .. } => {
            Content::Saved(Box::new(Saved::load((state, &memory), &build, &kvm, &ram, &mut timing)?))
        }
    };
    memory::register(&vm, &ram)?;
    // The vCPUs of a saved VM are where they were. A thread maps the memory that they will access, while the devices are
    // created.
    let (saved_vcpus, prefault) = match &content {
        Content::Kernel(_) => (Vec::new(), None),
        Content::Saved(saved) => {
            let vcpus = saved.restore_vcpus(&vm)?;
            let prefault = saved.prefault(&ram, &vcpus);
            (vcpus, prefault)
        }
    };
    let (memory, hotplug_memory) =
        reserve(ram, hotplug::range(memory_size, config.max_memory_mib << 20), Backing::Ordinary)?;
    let huge_range = hotplug::huge_range(memory_size, memory.last_addr().0 + 1, config.huge_mib << 20);
    let (memory, hotplug_huge_pages) = reserve(memory, huge_range, Backing::Huge)?;
    timing.step("memory");

    // Create the devices, in the order in which the guest finds them, and the spare slots.
    let vsock = Vsock::new(u64::from(config.vsock_cid), config.vsock_rate_limit)
        .map_err(|error| BootError::Host("the vsock device", error))?;
    let vsock = Arc::new(Mutex::new(vsock));
    let mut devices: Vec<(&str, SharedDevice)> = vec![("vsock", vsock.clone())];
    if let Some(share) = &config.share {
        let reporter = Arc::clone(reporter);
        let fs = Fs::new(share, belongings, move || reporter.report_fd_shortage()).map_err(BootError::Share)?;
        devices.push(("virtio-fs", shared(fs)));
    }
    let mut interfaces = Interfaces::new(Arc::clone(reporter));
    for (net, taps) in net {
        devices.push(("virtio-net", interfaces.create(&net, taps)?));
    }
    for (blk, file) in blk {
        let blk = Blk::new(file, blk.read_only, &blk.serial, blk.rate_limit).map_err(BootError::Disk)?;
        devices.push(("virtio-blk", shared(blk)));
    }
    devices.push(("virtio-rng", shared(Rng::new().map_err(|error| BootError::Host("virtio-rng", error))?)));
    let mut balloon: Option<Arc<Mutex<Balloon>>> = None;
    if config.balloon {
        let device = Balloon::new().map_err(|error| BootError::Host("the balloon", error))?;
        let device = balloon.insert(Arc::new(Mutex::new(device)));
        devices.push(("virtio-balloon", device.clone()));
    }
    let device_slots = devices.len() + usize::from(config.spare_slots);
    let memory_slots = [&hotplug_memory, &hotplug_huge_pages]
        .into_iter()
        .filter(|kind| matches!(kind, HotplugMemory::Reserved(_)))
        .count();
    let device_loop = PreparedLoop::new()?;
    let slots = Slots::new(vm.clone(), memory.clone(), device_loop.handle(), device_slots, memory_slots);
    let slots = Arc::new(slots);
    for (name, device) in &devices {
        slots.plug(device.clone(), Purpose::Any).map_err(|error| BootError::Plug((*name).to_owned(), error))?;
    }
    timing.step("virtio devices");

    // Create the console, and the bus that connects the console and the slots to the vCPUs.
    let serial_irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|error| BootError::Host("the console's interrupt", error))?;
    vm.register_irqfd(&serial_irq, layout::SERIAL_GSI).map_err(|error| BootError::Kvm("KVM_IRQFD", error))?;
    let console = Arc::new(Console::new(console, serial_irq).map_err(|error| BootError::Host("the console", error))?);
    let bus = Arc::new(Bus { console, slots: slots.clone() });
    timing.step("console");

    // Write the data that the kernel reads when it starts, or check that the saved VM is like this one.
    let machine =
        Machine { memory: memory_size, vcpus: config.vcpus, max_vcpus: config.max_vcpus, slots: slots.count() };
    match &content {
        Content::Kernel(kernel) => kernel.write_boot_data(&memory, &config, memory_size, slots.count())?,
        Content::Saved(saved) => saved.check(machine)?,
    }
    let vmgenid = VmGenId::new(&vm).map_err(|error| BootError::Host("the VM Generation ID", error))?;
    vmgenid.renew(&memory).map_err(|error| BootError::Host("the VM Generation ID", error))?;
    timing.step("boot data");

    // Create the vCPUs. The first vCPU is at the kernel's entry point. The other vCPUs wait until the first vCPU sends
    // a startup interprocessor interrupt.
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| BootError::Kvm("KVM_GET_SUPPORTED_CPUID", error))?;
    let cpuid_config =
        CpuidConfig { vcpus: config.max_vcpus, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
    let factory = VcpuFactory::new(vm.clone(), supported.as_slice().to_vec(), cpuid_config);
    let vcpus = match &content {
        Content::Kernel(kernel) => {
            let entry = |id| (id == 0).then_some(kernel.entry);
            (0..config.vcpus).map(|id| factory.create(id, entry(id))).collect::<Result<Vec<_>, _>>()?
        }
        Content::Saved(saved) => {
            saved.restore(&vm, &slots, &bus.console)?;
            vmgenid.notify().map_err(|error| BootError::Host("the VM Generation ID", error))?;
            timing.step("state of devices");
            drop(prefault);
            timing.step("prefault");
            saved_vcpus
        }
    };
    let saver = if config.saveable {
        let copies = vcpus.iter().map(|vcpu| factory.copy(vcpu)).collect::<Result<Vec<_>, _>>()?;
        let msrs = saved_msrs(&kvm).map_err(BootError::Saver)?;
        Some(Saver { vcpus: copies, msrs, machine, host: Host::read(&kvm)?, pagemap: None })
    } else {
        None
    };
    timing.step("vCPUs");

    // Start the threads. From here on, the guest may print.
    reporter.flush_at_exit(bus.console.clone());
    let devices = devices.into_iter().map(|(_, device)| device).collect();
    let event_loop = device_loop.start(devices, reporter.clone())?;
    let vcpus = Vcpus::start(vcpus, factory, &bus, reporter)?;
    timing.step("threads");
    Ok(Vm {
        vcpus,
        devices: Devices::new(slots, event_loop),
        vsock,
        balloon,
        hotplug_memory,
        hotplug_huge_pages,
        kvm: vm,
        kernel_moved: match &content {
            Content::Kernel(kernel) => kernel.moved.unwrap_or(0),
            Content::Saved(saved) => saved.kernel_moved(),
        },
        interfaces,
        saver,
        _vmgenid: vmgenid,
        running: false,
        memory,
    })
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, BootError> {
    // SAFETY: `into_raw_fd` gives up ownership of a valid, open fd. Therefore, `Kvm` is its only owner and closes it
    // once.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if u32::try_from(kvm.get_api_version()) == Ok(KVM_API_VERSION) { Ok(kvm) } else { Err(BootError::NotKvm) }
}

fn check_capabilities(kvm: &Kvm, vcpus: u8) -> Result<(), BootError> {
    let needed = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(BootError::Capability(name));
        }
    }
    let allowed = kvm.get_max_vcpus();
    if usize::from(vcpus) > allowed {
        return Err(BootError::Vcpus { wanted: vcpus, allowed });
    }
    Ok(())
}

/// Creates a VM. Retries KVM_CREATE_VM if a signal interrupts the call while the host kernel allocates memory.
fn create_vm(kvm: &Kvm) -> Result<VmFd, BootError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(|error| BootError::Kvm("KVM_CREATE_VM", error)),
        }
    }
}

/// Reserves guest-physical addresses for hot-plugged memory, if `range` is not `None`.
fn reserve(
    memory: GuestMemory,
    range: Option<(u64, u64)>,
    backing: Backing,
) -> Result<(GuestMemory, HotplugMemory), MemoryError> {
    match range {
        Some(range) => hotplug::reserve(&memory, range, backing)
            .map(|(memory, hotplug)| (memory, HotplugMemory::Reserved(hotplug))),
        None => Ok((memory, HotplugMemory::None)),
    }
}

fn shared(device: impl VirtioDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}
