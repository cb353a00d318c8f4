//! Loads the kernel and the initrd, and writes what the kernel reads when it starts.

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::arch::boot_params::{self, BootData, SEED_LEN};
use crate::arch::{device_tree, kaslr, layout, regs};
use crate::boot_timing::BootTiming;
use crate::config::VmConfig;
use crate::config_check::KernelFiles;
use crate::guest_memory::GuestMemory;
use crate::memory;

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

/// A kernel in guest memory.
pub struct Kernel {
    /// The kernel's entry point.
    pub entry: u64,
    /// Number of bytes by which the kernel was moved. `None` if the kernel cannot be moved.
    pub moved: Option<u64>,
    initrd: u64,
    initrd_len: u64,
}

impl Kernel {
    /// Loads the kernel and then the initrd into guest memory.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn load(
        KernelFiles { mut kernel, mut initrd, initrd_len }: KernelFiles,
        memory: &GuestMemory,
        config: &VmConfig,
        memory_size: u64,
        timing: &mut BootTiming,
    ) -> Result<Self, BootError> {
        let kernel_len = kernel.metadata().map_err(|error| BootError::Host("the kernel file", error))?.len();
        memory::prefault(memory, &prefault_ranges(memory_size, kernel_len, initrd_len))?;
        let loaded =
            Elf::load(memory, None, &mut kernel, Some(GuestAddress(layout::HIGH_RAM))).map_err(BootError::Kernel)?;
        timing.step("kernel read");
        let random = u64::from_ne_bytes(
            husk_base::entropy::bytes().map_err(|error| BootError::Host("a random kernel address", error))?,
        );
        let is_fixed = config.kernel_params.split_whitespace().any(|parameter| parameter == "nokaslr");
        let moved = if is_fixed { None } else { kaslr::randomize(memory, &kernel, loaded.kernel_end, random)? };
        timing.step("kernel moved");
        let start = loaded.kernel_end.next_multiple_of(PAGE);
        let end = start.saturating_add(initrd_len);
        if end >= memory_size.min(layout::HOLE_START) {
            return Err(BootError::TooSmall(end >> 20));
        }
        read_initrd(memory, &mut initrd, start, initrd_len)?;
        timing.step("initrd read");
        Ok(Self { entry: loaded.kernel_load.0, moved, initrd: start, initrd_len })
    }

    /// Writes the data that the kernel reads when it starts. `slots` is the number of virtio-mmio slots.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn write_boot_data(
        &self,
        memory: &GuestMemory,
        config: &VmConfig,
        memory_size: u64,
        slots: u32,
    ) -> Result<(), BootError> {
        // The device tree lists as many vCPUs as the VM can ever have. `maxcpus` limits how many of these vCPUs the
        // kernel brings up at boot.
        let maxcpus =
            if config.vcpus < config.max_vcpus { format!(" maxcpus={}", config.vcpus) } else { String::new() };
        let cmdline = format!("{CMDLINE}{maxcpus} {}", config.kernel_params);
        if cmdline.len() >= layout::CMDLINE_MAX {
            return Err(BootError::Cmdline(cmdline.len()));
        }
        let seed: [u8; SEED_LEN] = husk_base::entropy::bytes().map_err(|error| BootError::Host("the seed", error))?;
        let device_tree = device_tree::build(config.max_vcpus, slots).map_err(BootError::DeviceTree)?;
        let data = BootData {
            memory: memory_size,
            cmdline: cmdline.trim_end(),
            initrd: self.initrd,
            initrd_len: self.initrd_len,
            device_tree: &device_tree,
            seed,
            kaslr: self.moved.is_some(),
        };
        boot_params::write(memory, &data).map_err(BootError::Write)?;
        regs::write_tables(memory).map_err(BootError::Write)
    }
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

/// Reads the initrd directly into guest memory.
fn read_initrd(memory: &GuestMemory, file: &mut File, start: u64, len: u64) -> Result<(), BootError> {
    file.rewind().map_err(BootError::Initrd)?;
    let end = start.saturating_add(len);
    let len = usize::try_from(len).map_err(|_| BootError::TooSmall(end >> 20))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(|error| BootError::Initrd(io::Error::other(error)))
}
