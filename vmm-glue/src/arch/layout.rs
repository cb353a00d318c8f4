//! The map of guest-physical memory and of interrupts.
//!
//! Below 1 MiB lies what the kernel reads once at its start; RAM ends at 3 GiB and continues at 4 GiB, so that devices
//! and the interrupt controllers have their classical places in between.

/// Global descriptor table used for the first instructions.
pub const GDT: u64 = 0x500;
/// List of `setup_data` handed to the kernel.
pub const SETUP_DATA: u64 = 0x6000;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack at entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Root of the page tables at entry; the next two levels are the two pages behind it.
pub const PML4: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// Room for the command line with its final NUL (COMMAND_LINE_SIZE of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below 1 MiB that the kernel may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The device tree, as the second element of the list of `setup_data`.
pub const DEVICE_TREE: u64 = 0x3_0000;
/// Room for it.
pub const DEVICE_TREE_MAX: usize = 0x1_0000;
/// Where RAM begins again, behind the hole that a PC has below 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;
/// The generation id, in a page kept from the kernel's use. Some RAM lies between it and what is reserved below 1 MiB:
/// there Linux lets no driver claim memory, and it would merge the two.
pub const VMGENID: u64 = HIGH_RAM + 0x1000;
/// Length of the generation id.
pub const VMGENID_LEN: u64 = 16;
/// Where RAM continues behind the generation id's page.
pub const KERNEL_RAM: u64 = VMGENID + 0x1000;
/// RAM never lies from here …
pub const HOLE_START: u64 = 0xc000_0000;
/// … to here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio slot.
pub const MMIO: u64 = crate::slot_map::BASE;
/// Size of one virtio-mmio slot.
pub const MMIO_SLOT: u64 = crate::slot_map::SIZE;
/// I/O APIC, where KVM puts it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC, where KVM puts it.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages for KVM's own use on Intel, outside everything else.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Pins of the I/O APIC.
pub const GSIS: u32 = 24;
/// Interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the first virtio-mmio slot; 0 to 4 are timer, keyboard, cascade and serial ports.
pub const FIRST_SLOT_GSI: u32 = 5;
/// Interrupt of the generation id.
pub const VMGENID_GSI: u32 = GSIS - 1;
/// How many virtio-mmio slots there can be: each has an interrupt to itself.
pub const MAX_SLOTS: usize = (VMGENID_GSI - FIRST_SLOT_GSI) as usize;

/// Where a virtio-mmio slot's registers are.
pub fn slot_address(slot: u32) -> u64 {
    MMIO + u64::from(slot) * MMIO_SLOT
}

/// A virtio-mmio slot's interrupt.
pub fn slot_gsi(slot: u32) -> u32 {
    FIRST_SLOT_GSI + slot
}

/// RAM of a guest with this much memory: guest-physical start and length.
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
