//! The boot recipe: from a checked configuration to a machine whose vCPUs stand at the kernel's entry, from top to
//! bottom in one function.

use std::collections::HashMap;
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
use crate::arch::cpuid::Machine;
use crate::arch::{device_tree, layout, regs};
use crate::bus::Bus;
use crate::child::Reporter;
use crate::config::check::Checked;
use crate::event_loop::{EventLoop, LoopError};
use crate::memory::hotplug::Backing;
use crate::memory::{self, MemoryError, hotplug};
use crate::serial::Console;
use crate::timing::Timing;
use crate::vcpu::make::{MakeError, Maker};
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkError};
use crate::virtio::device::{GuestMemory, VirtioDevice};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mmio::SharedDevice;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::slots::{PlugError, Purpose, Slots};
use crate::virtio::vsock::Vsock;
use crate::vm::{Growth, Vm};
use crate::vmgenid::{self, VmGenId};

/// Always on the guest's command line:
/// - `console`, `quiet`: each character on the serial port is an exit, so errors only;
/// - `reboot=k panic=-1`: a panic ends the machine at once, through the keyboard controller's reset;
/// - `rcupdate.rcu_expedited=1`: grace periods by interprocessor interrupt, not by waiting for ticks: unmounts and
///   namespaces of a container's start and end wait for many, and the processors are few;
/// - `swiotlb=noforce`: no bounce buffers (64 MiB touched in a guest with more than 3 GiB): virtio needs none;
/// - `noreplace-smp`: with one processor the kernel would patch each of its ten thousand lock prefixes away, one at a
///   time (a seventh of the boot in the test node), and back when a second one comes;
/// - `tsc=reliable`: no check of the clock against slower clocks that this machine does not have; `kvm-clock` stays
///   the clock source where the TSC is not stable.
const CMDLINE: &str =
    "console=ttyS0 quiet panic=-1 reboot=k rcupdate.rcu_expedited=1 swiotlb=noforce noreplace-smp tsc=reliable";

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The descriptor is no KVM, or an old one.
    #[error("/dev/kvm: not KVM with API version 12")]
    NotKvm,
    /// KVM cannot do what we need.
    #[error("/dev/kvm: this host's KVM lacks {0}")]
    Capability(&'static str),
    /// More vCPUs than this host can run in one machine.
    #[error("/dev/kvm: {wanted} vCPUs wanted, this host allows {allowed}")]
    Vcpus {
        /// What the configuration says.
        wanted: u8,
        /// KVM_CAP_MAX_VCPUS.
        allowed: usize,
    },
    /// An ioctl of KVM failed.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel is no kernel.
    #[error("cannot load the guest kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The initial RAM file system does not fit.
    #[error("guest memory is too small for kernel and initrd: they end at {0} MiB")]
    TooSmall(u64),
    /// The initial RAM file system cannot be read.
    #[error("cannot load the initrd")]
    Initrd(#[source] io::Error),
    /// Boot data cannot be written.
    #[error("cannot write boot data to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
    /// Too many parameters.
    #[error("the kernel command line is {0} bytes long, allowed are 2047")]
    Cmdline(usize),
    /// The device tree is malformed.
    #[error("cannot write the device tree")]
    DeviceTree(#[source] vm_fdt::Error),
    /// A vCPU could not be made.
    #[error(transparent)]
    Vcpu(#[from] MakeError),
    /// A host resource could not be had.
    #[error("cannot prepare {0}")]
    Host(&'static str, #[source] io::Error),
    /// The shared directory cannot be served.
    #[error("cannot share the directory")]
    Share(#[source] FsError),
    /// A device could not be plugged in.
    #[error("cannot plug in {0}")]
    Plug(String, #[source] PlugError),
    /// A disk cannot be used.
    #[error("cannot use the disk")]
    Disk(#[source] BlkError),
    /// The device loop did not start.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The vCPU threads did not start.
    #[error(transparent)]
    Threads(#[from] VcpuError),
}

/// Builds the machine; its vCPUs wait.
///
/// # Errors
/// [`BootError`].
pub fn build(checked: Checked, reporter: &Arc<Reporter>) -> Result<Vm, BootError> {
    let mut timing = Timing::start();
    let Checked { config, memory: memory_size, kvm, mut kernel, mut initrd, initrd_len, console, net, blk } = checked;

    // KVM, and whether it can do all this.
    let kvm = open_kvm(kvm)?;
    check_capabilities(&kvm, config.max_vcpus)?;

    // An empty machine. Its interrupt controllers and timer are KVM's, and must be there before vCPUs.
    let vm = Arc::new(create_vm(&kvm)?);
    timing.step("KVM_CREATE_VM");
    vm.set_tss_address(layout::KVM_TSS).map_err(|error| BootError::Kvm("KVM_SET_TSS_ADDR", error))?;
    vm.create_irq_chip().map_err(|error| BootError::Kvm("KVM_CREATE_IRQCHIP", error))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(|error| BootError::Kvm("KVM_CREATE_PIT2", error))?;
    timing.step("interrupt controllers");

    // Memory, with kernel and initrd in it, one behind the other.
    let ram = memory::map(memory_size)?;
    let kernel_len = kernel.metadata().map_err(|error| BootError::Host("the kernel's length", error))?.len();
    let ram_end = memory_size.min(layout::HOLE_START);
    memory::prefault(&ram, &dense(memory_size, kernel_len, initrd_len))?;
    memory::give_to(&vm, &ram)?;
    let (memory, growth) = reserve(ram, hotplug::range(memory_size, config.max_memory_mib << 20), Backing::Ordinary)?;
    let behind = hotplug::huge_range(memory_size, memory.last_addr().0 + 1, config.huge_mib << 20);
    let (memory, huge) = reserve(memory, behind, Backing::Huge)?;
    timing.step("memory");
    let loaded =
        Elf::load(&memory, None, &mut kernel, Some(GuestAddress(layout::HIGH_RAM))).map_err(BootError::Kernel)?;
    timing.step("kernel read");
    let initrd_start = loaded.kernel_end.next_multiple_of(PAGE);
    let initrd_end = initrd_start.saturating_add(initrd_len);
    if initrd_end >= ram_end {
        return Err(BootError::TooSmall(initrd_end >> 20));
    }
    read_initrd(&memory, &mut initrd, initrd_start, initrd_len)?;
    timing.step("initrd read");

    // Devices, in the order the guest finds them, and slots to spare.
    let vsock = Vsock::new(u64::from(config.vsock_cid)).map_err(|error| BootError::Host("vsock", error))?;
    let vsock = Arc::new(Mutex::new(vsock));
    let mut devices: Vec<(&str, SharedDevice)> = vec![("vsock", vsock.clone())];
    if let Some(share) = &config.share {
        let told = Arc::clone(reporter);
        let fs = Fs::new(share, move || told.many_files()).map_err(BootError::Share)?;
        devices.push(("virtio-fs", shared(fs)));
    }
    for (net, backend) in net {
        let net = Net::new(backend, net.mac, net.mtu).map_err(|error| BootError::Host("the tap", error))?;
        devices.push(("virtio-net", shared(net)));
    }
    for (blk, file) in blk {
        let blk = Blk::new(file, blk.read_only, &blk.serial).map_err(BootError::Disk)?;
        devices.push(("virtio-blk", shared(blk)));
    }
    devices.push(("virtio-rng", shared(Rng::new().map_err(|error| BootError::Host("virtio-rng", error))?)));
    let mut balloon: Option<Arc<Mutex<Balloon>>> = None;
    if config.balloon {
        let device = Balloon::new().map_err(|error| BootError::Host("virtio-balloon", error))?;
        let device = balloon.insert(Arc::new(Mutex::new(device)));
        devices.push(("virtio-balloon", device.clone()));
    }
    let open = devices.len() + usize::from(config.spare_slots);
    let kept = [&growth, &huge].into_iter().filter(|kind| matches!(kind, Growth::Reserved(_))).count();
    let slots = Arc::new(Slots::new(vm.clone(), memory.clone(), open, kept));
    for (name, device) in &devices {
        slots.plug(device.clone(), Purpose::Any).map_err(|error| BootError::Plug((*name).to_owned(), error))?;
    }
    timing.step("virtio devices");

    // The console, and the bus that leads to all of them.
    let serial_irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|error| BootError::Host("the console's interrupt", error))?;
    vm.register_irqfd(&serial_irq, layout::SERIAL_GSI).map_err(|error| BootError::Kvm("KVM_IRQFD", error))?;
    let console = Arc::new(Console::new(console, serial_irq).map_err(|error| BootError::Host("the console", error))?);
    reporter.flush_at_exit(console.clone());
    let bus = Arc::new(Bus { console, slots: slots.clone() });
    timing.step("console");

    // What the kernel reads at its start.
    // The tree has all processors that there may be; those of the start come up.
    let maxcpus = if config.vcpus < config.max_vcpus { format!(" maxcpus={}", config.vcpus) } else { String::new() };
    let cmdline = format!("{CMDLINE}{maxcpus} {}", config.kernel_params);
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let mut seed = [0; SEED_LEN];
    vmgenid::fill_random(&mut seed).map_err(|error| BootError::Host("entropy", error))?;
    let device_tree = device_tree::build(config.max_vcpus, slots.count()).map_err(BootError::DeviceTree)?;
    let data = BootData {
        memory: memory_size,
        cmdline: cmdline.trim_end(),
        initrd: initrd_start,
        initrd_len,
        device_tree: &device_tree,
        seed,
    };
    boot_params::write(&memory, &data).map_err(BootError::Write)?;
    regs::write_tables(&memory).map_err(BootError::Write)?;
    let vmgenid = VmGenId::new(&vm).map_err(|error| BootError::Host("the generation id", error))?;
    vmgenid.renew(&memory).map_err(|error| BootError::Host("the generation id", error))?;
    timing.step("boot data");

    // vCPUs: the first at the kernel's entry, the others waiting for its signal.
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| BootError::Kvm("KVM_GET_SUPPORTED_CPUID", error))?;
    let machine = Machine { vcpus: config.max_vcpus, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
    let maker = Maker::new(vm.clone(), supported.as_slice().to_vec(), machine);
    let mut vcpus = Vec::with_capacity(usize::from(config.vcpus));
    for id in 0..config.vcpus {
        vcpus.push(maker.make(id, (id == 0).then_some(loaded.kernel_load.0))?);
    }
    timing.step("vCPUs");

    // Threads.
    let devices = devices.into_iter().map(|(_, device)| device).collect();
    let event_loop = EventLoop::start(devices, reporter.clone())?;
    let vcpus = Vcpus::start(vcpus, maker, &bus, reporter)?;
    timing.step("threads");
    Ok(Vm {
        vcpus,
        event_loop,
        slots,
        added: HashMap::new(),
        vsock,
        balloon,
        growth,
        huge,
        kvm: vm,
        _vmgenid: vmgenid,
        running: false,
        _memory: memory,
    })
}

/// The parts of memory that a boot fills nearly whole, in the order in which they are needed: the kernel's second half
/// (its first is being read meanwhile) and the initrd with what is unpacked behind it; the end of RAM, where the kernel
/// puts what it allocates first (64 bytes for each page, hash tables); and all below the kernel, which its page
/// allocator hands out first. Elsewhere it uses one page here and there.
fn dense(memory: u64, kernel_len: u64, initrd_len: u64) -> Vec<(u64, u64)> {
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

/// Where a kernel of ours begins (CONFIG_PHYSICAL_START); only what is faulted in ahead depends on it.
const KERNEL_START: u64 = 16 << 20;
/// What the boot fills behind the initrd beside its copy.
const UNPACKED: u64 = 2 << 20;
/// What the boot fills at the end of RAM beside the array of pages.
const FIRST_ALLOCATIONS: u64 = 8 << 20;
const PAGE: u64 = 4096;

fn open_kvm(fd: OwnedFd) -> Result<Kvm, BootError> {
    // SAFETY: the descriptor is ours, and open until Kvm closes it.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if kvm.get_api_version() == KVM_API_VERSION as i32 { Ok(kvm) } else { Err(BootError::NotKvm) }
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

/// KVM_CREATE_VM, which a signal may interrupt while the host allocates.
fn create_vm(kvm: &Kvm) -> Result<VmFd, BootError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(|error| BootError::Kvm("KVM_CREATE_VM", error)),
        }
    }
}

/// Keeps addresses for memory that may be plugged in, if there is to be any.
fn reserve(
    memory: GuestMemory,
    range: Option<(u64, u64)>,
    backing: Backing,
) -> Result<(GuestMemory, Growth), MemoryError> {
    match range {
        Some(range) => {
            hotplug::reserve(&memory, range, backing).map(|(memory, hotplug)| (memory, Growth::Reserved(hotplug)))
        }
        None => Ok((memory, Growth::None)),
    }
}

fn shared(device: impl VirtioDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

/// Reads the file straight into guest memory.
fn read_initrd(memory: &GuestMemory, file: &mut File, start: u64, len: u64) -> Result<(), BootError> {
    file.rewind().map_err(BootError::Initrd)?;
    let len = usize::try_from(len).map_err(|_| BootError::TooSmall(len >> 20))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(|error| BootError::Initrd(io::Error::other(error)))
}
