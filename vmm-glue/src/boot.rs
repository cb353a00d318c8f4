//! Builds a VM from a checked configuration, in one function that lists the steps from top to bottom. After the last
//! step, the boot vCPU is at the kernel's entry point, and no vCPU runs yet.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::boot_params::{self, BootData, SEED_LEN};
use crate::arch::cpuid::CpuidConfig;
use crate::arch::kaslr::{self, KaslrError};
use crate::arch::{device_tree, layout, regs};
use crate::boot_timing::BootTiming;
use crate::bus::Bus;
use crate::config_check::CheckedConfig;
use crate::event_loop::{LoopError, PreparedLoop};
use crate::guest_memory::GuestMemory;
use crate::jail::Belongings;
use crate::memory::hotplug::Backing;
use crate::memory::{self, MemoryError, hotplug};
use crate::reporter::Reporter;
use crate::serial::Console;
use crate::vcpu::factory::{CreateVcpuError, VcpuFactory};
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::device::{SharedDevice, VirtioDevice};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::rng::Rng;
use crate::virtio::slots::{PlugError, Purpose, Slots};
use crate::virtio::vsock::Vsock;
use crate::vm::{Devices, HotplugMemory, InterfaceError, Interfaces, Vm};
use crate::vmgenid::VmGenId;

/// Kernel parameters that every guest gets:
/// - `console`, `quiet`: the kernel prints only errors, because each character on the serial port is a VM exit;
/// - `reboot=k panic=-1`: a panic resets the VM at once, through the keyboard controller;
/// - `rcupdate.rcu_expedited=1`: RCU grace periods use interprocessor interrupts and do not wait for ticks. Starting
///   and stopping a container unmounts file systems and removes namespaces, and each of these operations waits for many
///   grace periods. With few vCPUs, the interrupts are cheap;
/// - `swiotlb=noforce`: the kernel does not allocate bounce buffers, because virtio does not need them. The buffers
///   would occupy 64 MiB in a guest with more than 3 GiB;
/// - `noreplace-smp`: the kernel keeps its ten thousand lock prefixes. Otherwise, a kernel with one vCPU would remove
///   the prefixes one at a time, which takes a seventh of the boot time in the test node. The kernel would restore the
///   prefixes when a second vCPU is hot-plugged;
/// - `tsc=reliable`: the kernel does not check the TSC against slower clocks, because this VM does not have any.
///   `kvm-clock` stays the clock source if the TSC is not stable.
const CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 reboot=k rcupdate.rcu_expedited=1 swiotlb=noforce noreplace-smp tsc=reliable";

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

/// Builds the VM. Its vCPUs do not run until [`Vm::resume`].
pub fn build(checked: CheckedConfig, belongings: Belongings, reporter: &Arc<Reporter>) -> Result<Vm, BootError> {
    let mut timing = BootTiming::start();
    let CheckedConfig { config, memory: memory_size, kvm, mut kernel, mut initrd, initrd_len, console, net, blk } =
        checked;

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

    // Map guest memory. Load the kernel, and then the initrd, into guest memory.
    let ram = memory::map(memory_size)?;
    let kernel_len = kernel.metadata().map_err(|error| BootError::Host("the kernel file", error))?.len();
    let ram_end = memory_size.min(layout::HOLE_START);
    memory::prefault(&ram, &prefault_ranges(memory_size, kernel_len, initrd_len))?;
    memory::register(&vm, &ram)?;
    let (memory, hotplug_memory) =
        reserve(ram, hotplug::range(memory_size, config.max_memory_mib << 20), Backing::Ordinary)?;
    let huge_range = hotplug::huge_range(memory_size, memory.last_addr().0 + 1, config.huge_mib << 20);
    let (memory, hotplug_huge_pages) = reserve(memory, huge_range, Backing::Huge)?;
    timing.step("memory");
    let loaded =
        Elf::load(&memory, None, &mut kernel, Some(GuestAddress(layout::HIGH_RAM))).map_err(BootError::Kernel)?;
    timing.step("kernel read");
    let random = u64::from_ne_bytes(
        husk_base::entropy::bytes().map_err(|error| BootError::Host("a random kernel address", error))?,
    );
    let is_fixed = config.kernel_params.split_whitespace().any(|parameter| parameter == "nokaslr");
    let kernel_moved = if is_fixed { None } else { kaslr::randomize(&memory, &kernel, loaded.kernel_end, random)? };
    timing.step("kernel moved");
    let initrd_start = loaded.kernel_end.next_multiple_of(PAGE);
    let initrd_end = initrd_start.saturating_add(initrd_len);
    if initrd_end >= ram_end {
        return Err(BootError::TooSmall(initrd_end >> 20));
    }
    read_initrd(&memory, &mut initrd, initrd_start, initrd_len)?;
    timing.step("initrd read");

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
    reporter.flush_at_exit(console.clone());
    let bus = Arc::new(Bus { console, slots: slots.clone() });
    timing.step("console");

    // Write the data that the kernel reads when it starts. The device tree lists as many vCPUs as the VM can ever have.
    // `maxcpus` limits how many of these vCPUs the kernel brings up at boot.
    let maxcpus = if config.vcpus < config.max_vcpus { format!(" maxcpus={}", config.vcpus) } else { String::new() };
    let cmdline = format!("{CMDLINE}{maxcpus} {}", config.kernel_params);
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let seed: [u8; SEED_LEN] = husk_base::entropy::bytes().map_err(|error| BootError::Host("the seed", error))?;
    let device_tree = device_tree::build(config.max_vcpus, slots.count()).map_err(BootError::DeviceTree)?;
    let data = BootData {
        memory: memory_size,
        cmdline: cmdline.trim_end(),
        initrd: initrd_start,
        initrd_len,
        device_tree: &device_tree,
        seed,
        kaslr: kernel_moved.is_some(),
    };
    boot_params::write(&memory, &data).map_err(BootError::Write)?;
    regs::write_tables(&memory).map_err(BootError::Write)?;
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
    let mut vcpus = Vec::with_capacity(usize::from(config.vcpus));
    for id in 0..config.vcpus {
        vcpus.push(factory.create(id, (id == 0).then_some(loaded.kernel_load.0))?);
    }
    timing.step("vCPUs");

    // Start the threads.
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
        kernel_moved: kernel_moved.unwrap_or(0),
        interfaces,
        _vmgenid: vmgenid,
        running: false,
        _memory: memory,
    })
}

/// Returns the ranges of guest memory (start, end) that the boot fills almost completely, in the order in which the
/// prefault thread faults in the ranges:
/// - the second half of the kernel, the initrd and the initrd's unpacked files. While the prefault thread faults in
///   this range, the VMM reads the first half of the kernel;
/// - the end of RAM, where the kernel makes its first allocations: 64 bytes for each page, and hash tables;
/// - the first half of the kernel;
/// - all memory below the kernel, which the kernel's page allocator hands out first.
///
/// In the rest of memory, the kernel uses only single, scattered pages.
fn prefault_ranges(memory: u64, kernel_len: u64, initrd_len: u64) -> Vec<(u64, u64)> {
    let kernel_end = KERNEL_START + kernel_len + 2 * initrd_len + UNPACKED;
    let mut ranges = vec![
        (KERNEL_START + kernel_len / 2, kernel_end),
        (KERNEL_START, KERNEL_START + kernel_len / 2),
        (0, KERNEL_START),
    ];
    if let Some(&(start, len)) = layout::ram(memory).last() {
        ranges.insert(1, (start + len - (memory / 64 + FIRST_ALLOCATIONS).min(len), start + len));
    }
    ranges
}

/// Start address of the guest kernel (CONFIG_PHYSICAL_START). Only the ranges to prefault depend on this address.
const KERNEL_START: u64 = 16 << 20;
/// Number of bytes that the boot fills after the initrd, in addition to the initrd's unpacked copy.
const UNPACKED: u64 = 2 << 20;
/// Number of bytes that the boot fills at the end of RAM, in addition to the `struct page` array.
const FIRST_ALLOCATIONS: u64 = 8 << 20;
const PAGE: u64 = 4096;

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

/// Reads the initrd directly into guest memory.
fn read_initrd(memory: &GuestMemory, file: &mut File, start: u64, len: u64) -> Result<(), BootError> {
    file.rewind().map_err(BootError::Initrd)?;
    let end = start.saturating_add(len);
    let len = usize::try_from(len).map_err(|_| BootError::TooSmall(end >> 20))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(|error| BootError::Initrd(io::Error::other(error)))
}
