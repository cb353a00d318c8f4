//! Writes boot data to guest memory: the zero page, its memory map and `setup_data`. The kernel's 64-bit boot protocol
//! requires this data.
//!
//! See Documentation/arch/x86/boot.rst and zero-page.rst of Linux.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout;
use crate::guest_memory::GuestMemory;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADER_UNDEFINED: u8 = 0xff;
/// Bit of `loadflags`: the kernel's virtual address is random.
const KASLR_FLAG: u8 = 1 << 1;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Type of a `setup_data` element that contains a device tree.
const SETUP_DTB: u32 = 2;
/// Type of a `setup_data` element that contains a seed for the kernel's random number generator.
const SETUP_RNG_SEED: u32 = 9;
/// Length of the seed in bytes. The kernel's generator needs this number of bytes for full strength.
pub const SEED_LEN: usize = 32;

/// Wrapper of `boot_params`, so that vm-memory can write it to guest memory as plain data.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: boot_params is a packed C structure of integers without padding. Therefore, every byte pattern is valid, and
// all bytes are initialized.
unsafe impl ByteValued for ZeroPage {}

/// Addresses and contents that the kernel gets at boot.
pub struct BootData<'a> {
    /// Size of guest memory in bytes.
    pub memory: u64,
    /// Command line without its final NUL.
    pub cmdline: &'a str,
    /// Guest-physical address of the initrd.
    pub initrd: u64,
    /// Length of the initrd in bytes.
    pub initrd_len: u64,
    /// The device tree.
    pub device_tree: &'a [u8],
    /// Fresh entropy for the kernel's random number generator.
    pub seed: [u8; SEED_LEN],
    /// Whether the VMM has moved the kernel to a random virtual address. If so, the kernel also chooses random virtual
    /// addresses for the direct mapping of memory, vmalloc and the `struct page` array (arch/x86/mm/kaslr.c).
    pub kaslr: bool,
}

/// Writes the zero page, the command line and the `setup_data` list.
pub fn write(memory: &GuestMemory, data: &BootData<'_>) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(data.cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + data.cmdline.len() as u64))?;

    // The kernel credits the seed as entropy. Therefore, the generator is ready before the first process needs random
    // numbers. The kernel then wipes the seed from memory.
    write_setup_data(memory, layout::SETUP_DATA, layout::DEVICE_TREE, SETUP_RNG_SEED, &data.seed)?;
    write_setup_data(memory, layout::DEVICE_TREE, 0, SETUP_DTB, data.device_tree)?;

    let mut params = ZeroPage::default().0;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.loadflags = if data.kaslr { KASLR_FLAG } else { 0 };
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE)?;
    params.hdr.cmdline_size = low(data.cmdline.len() as u64)?;
    params.hdr.ramdisk_image = low(data.initrd)?;
    params.hdr.ramdisk_size = low(data.initrd_len)?;
    params.hdr.setup_data = layout::SETUP_DATA;

    let map = e820(data.memory);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    for (slot, (addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, type_ };
    }
    memory.write_obj(ZeroPage(params), GuestAddress(layout::ZERO_PAGE))
}

/// Returns an address or length as the 32 bits that the fields of the setup header have.
fn low(number: u64) -> Result<u32, vm_memory::GuestMemoryError> {
    u32::try_from(number).map_err(|_| vm_memory::GuestMemoryError::InvalidGuestAddress(GuestAddress(number)))
}

/// Writes one element of the `setup_data` list. The next element is at `next`.
fn write_setup_data(
    memory: &GuestMemory,
    address: u64,
    next: u64,
    kind: u32,
    data: &[u8],
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend_from_slice(&next.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&low(data.len() as u64)?.to_le_bytes());
    bytes.extend_from_slice(data);
    memory.write_slice(&bytes, GuestAddress(address))
}

/// Returns the memory map: start, length and type of each range.
fn e820(memory: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, E820_RESERVED),
        (layout::HIGH_RAM, layout::VMGENID - layout::HIGH_RAM, E820_RAM),
        (layout::VMGENID, layout::KERNEL_RAM - layout::VMGENID, E820_RESERVED),
    ];
    for (start, len) in layout::ram(memory) {
        let from = start.max(layout::KERNEL_RAM);
        map.push((from, start + len - from, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn write_refuses_an_initrd_that_does_not_fit_into_32_bits() {
        let high_ram = usize::try_from(layout::HIGH_RAM).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), high_ram)]).unwrap();
        let result = |initrd, initrd_len| {
            let (cmdline, device_tree, seed) = ("quiet", &[0; 8][..], [0; SEED_LEN]);
            let data = BootData { memory: 64 << 20, cmdline, initrd, initrd_len, device_tree, seed, kaslr: false };
            write(&memory, &data)
        };
        assert!(result(u32::MAX.into(), u32::MAX.into()).is_ok());
        assert!(result(1 << 32, 1).is_err());
        assert!(result(1, 1 << 32).is_err());
    }

    proptest! {
        #[test]
        fn memory_map_is_ordered_and_complete(mib in 64u64..1 << 20) {
            let map = e820(mib << 20);
            let mut end = 0;
            for (start, len, _) in &map {
                prop_assert!(*start >= end);
                end = start + len;
            }
            let ram: u64 = map.iter().filter(|(_, _, kind)| *kind == E820_RAM).map(|(_, len, _)| len).sum();
            prop_assert_eq!(ram, (mib << 20) - (layout::HIGH_RAM - layout::LOW_RAM_END) - 4096);
        }
    }
}
