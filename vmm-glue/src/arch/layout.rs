//! The layout of guest-physical memory and of interrupts.
//!
//! The data that the kernel reads once, when it starts, is below 1 MiB. RAM ends at 3 GiB and continues at 4 GiB.
//! Devices and interrupt controllers are between 3 GiB and 4 GiB, at the addresses that are usual for a PC.

/// Global descriptor table, used for the first instructions.
pub const GDT: u64 = 0x500;
/// First element of the `setup_data` list.
pub const SETUP_DATA: u64 = 0x6000;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack at entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Root of the page tables at entry. The two pages after this page contain the next two levels.
pub const PML4: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// Maximum length of the command line with its final NUL (COMMAND_LINE_SIZE of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below 1 MiB that the kernel may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The device tree: the second element of the `setup_data` list.
pub const DEVICE_TREE: u64 = 0x3_0000;
/// Maximum length of the device tree in bytes.
pub const DEVICE_TREE_MAX: usize = 0x1_0000;
/// Address at which RAM continues, after the hole that a PC has below 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;
/// The VM Generation ID, in a page that the kernel does not use. This page must not be in the reserved range below 1
/// MiB, where Linux does not let a driver claim memory. There is RAM between that range and this page, because Linux
/// would otherwise merge the range and the page.
pub const VMGENID: u64 = HIGH_RAM + 0x1000;
/// Length of the VM Generation ID in bytes.
pub const VMGENID_LEN: usize = 16;
/// Address at which RAM continues after the VM Generation ID's page.
pub const KERNEL_RAM: u64 = VMGENID + 0x1000;
/// Start of the hole in RAM below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole in RAM below 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio slot.
pub const MMIO: u64 = crate::mmio_slots::BASE;
/// Size of one virtio-mmio slot.
pub const MMIO_SLOT: u64 = crate::mmio_slots::SIZE;
/// Address of the I/O APIC in KVM.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Address of the local APIC in KVM.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM uses on Intel CPUs, outside of all other ranges.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Number of pins of the I/O APIC.
pub const GSIS: u32 = 24;
/// Interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the first virtio-mmio slot. Interrupts 0 to 4 belong to the timer, the keyboard, the cascade and the
/// serial ports.
pub const FIRST_SLOT_GSI: u32 = 5;
/// Interrupt of the VM Generation ID.
pub const VMGENID_GSI: u32 = GSIS - 1;
/// Maximum number of virtio-mmio slots. Each slot needs its own interrupt.
pub const MAX_SLOTS: usize = (VMGENID_GSI - FIRST_SLOT_GSI) as usize;

/// Returns the address of a virtio-mmio slot's registers.
pub fn slot_address(slot: u32) -> u64 {
    MMIO + u64::from(slot) * MMIO_SLOT
}

/// Returns a virtio-mmio slot's interrupt.
pub fn slot_gsi(slot: u32) -> u32 {
    FIRST_SLOT_GSI + slot
}

/// Returns the guest-physical start and the length of each RAM range, for a guest with `bytes` bytes of memory.
pub fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, bytes.min(HOLE_START))];
    if bytes > HOLE_START {
        ranges.push((HOLE_END, bytes - HOLE_START));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_avoids_the_hole() {
        assert_eq!(ram(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ram(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }
}
