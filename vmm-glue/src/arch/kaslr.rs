//! Moves the guest kernel to a random virtual address (KASLR).
//!
//! The decompressor of a compressed kernel moves the kernel (arch/x86/boot/compressed/kaslr.c and misc.c of Linux).
//! Husk boots an uncompressed ELF image, which has no decompressor. Therefore, `cargo xtask kernel` adds the
//! decompressor's table of relocations to the image, as the section [`SECTION`]. The VMM applies the table. The
//! kernel's physical address stays the same. The kernel itself computes the difference between its virtual and its
//! physical address (`__startup_64`).
//!
//! The table contains little-endian 32-bit integers: three lists, each with a zero before its first element. Each
//! element, sign-extended to 64 bits, is the virtual address of a number. This number depends on the kernel's virtual
//! address.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::guest_memory::GuestMemory;

/// Name of the section that contains the table of relocations.
const SECTION: &[u8] = b".husk.relocs\0";
/// Virtual address at which a kernel that was not moved maps physical address 0 (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Size of the range of virtual addresses for the kernel (`KERNEL_IMAGE_SIZE` with CONFIG_RANDOMIZE_BASE).
const IMAGE_RANGE: u64 = 1 << 30;
/// Alignment of the kernel's virtual address (CONFIG_PHYSICAL_ALIGN).
const ALIGN: u64 = 2 << 20;
/// Size of an ELF section header.
const SECTION_HEADER: usize = 64;
/// Number of bytes of the table that are read at once.
const CHUNK: usize = 1 << 16;

/// Error from moving the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KaslrError {
    /// The image could not be read.
    #[error("failed to read the relocations of the guest kernel")]
    Read(#[source] io::Error),
    /// The table has more than three lists, or its first integer is not zero.
    #[error("invalid relocations of the guest kernel: the section .husk.relocs does not contain three lists")]
    Format,
    /// An element refers to memory outside of the kernel.
    #[error("invalid relocations of the guest kernel: {address:#x} is not an address in the kernel")]
    Address {
        /// The virtual address.
        address: u64,
    },
    /// The kernel is not in guest memory.
    #[error("failed to access the guest kernel in guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Moves the loaded kernel, which ends at the guest-physical address `end`, to a random virtual address. `random` is a
/// random number. Returns the number of bytes by which the kernel has moved. If the image has no table of relocations,
/// the function does not move the kernel, and returns `None`.
///
/// No other thread may access the kernel during the call.
pub fn randomize(memory: &GuestMemory, image: &File, end: u64, random: u64) -> Result<Option<u64>, KaslrError> {
    let Some((offset, len)) = find_section(image).map_err(KaslrError::Read)? else { return Ok(None) };
    let positions = 1 + IMAGE_RANGE.saturating_sub(end) / ALIGN;
    let distance = random % positions * ALIGN;
    let kernel_len = usize::try_from(end).unwrap_or(usize::MAX);
    let kernel = memory.get_slice(GuestAddress(0), kernel_len).map_err(KaslrError::Memory)?;
    let guard = kernel.ptr_guard_mut();
    let mut relocator = Relocator { start: guard.as_ptr(), len: kernel_len, distance, list: None };
    let mut chunk = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let rest = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
        let part = chunk.get_mut(..rest).unwrap_or_default();
        image.read_exact_at(part, offset + done).map_err(KaslrError::Read)?;
        for element in part.chunks_exact(4) {
            relocator.apply(i32::from_le_bytes(array(element)))?;
        }
        done += rest as u64;
    }
    Ok(Some(distance))
}

/// Returns the address that an instruction of a moved kernel has in the image. Returns other addresses unchanged.
pub fn address_in_image(address: u64, distance: u64) -> u64 {
    let is_in_kernel = (KERNEL_MAP..KERNEL_MAP + IMAGE_RANGE).contains(&address);
    address.checked_sub(distance).filter(|_| is_in_kernel).unwrap_or(address)
}

/// The lists of the table, in their order.
#[derive(Clone, Copy)]
enum List {
    /// 64-bit addresses.
    Wide,
    /// 32-bit numbers that decrease when the kernel's address increases.
    Inverse,
    /// The low 32 bits of addresses.
    Narrow,
}

struct Relocator {
    /// Start of guest memory. The kernel ends `len` bytes after the start.
    start: *mut u8,
    len: usize,
    /// Number of bytes by which the kernel moves.
    distance: u64,
    /// The list of the next element.
    list: Option<List>,
}

impl Relocator {
    /// Handles the next integer of the table.
    fn apply(&mut self, element: i32) -> Result<(), KaslrError> {
        if element == 0 {
            self.list = Some(match self.list {
                None => List::Wide,
                Some(List::Wide) => List::Inverse,
                Some(List::Inverse) => List::Narrow,
                Some(List::Narrow) => return Err(KaslrError::Format),
            });
            return Ok(());
        }
        let address = i64::from(element).cast_unsigned();
        let at = usize::try_from(address.wrapping_sub(KERNEL_MAP)).unwrap_or(usize::MAX);
        let narrow = (self.distance & 0xffff_ffff) as u32;
        let is_in_kernel = match self.list {
            None => return Err(KaslrError::Format),
            Some(List::Wide) => {
                self.change(at, |value| u64::from_le_bytes(value).wrapping_add(self.distance).to_le_bytes())
            }
            Some(List::Inverse) => {
                self.change(at, |value| u32::from_le_bytes(value).wrapping_sub(narrow).to_le_bytes())
            }
            Some(List::Narrow) => self.change(at, |value| u32::from_le_bytes(value).wrapping_add(narrow).to_le_bytes()),
        };
        if is_in_kernel { Ok(()) } else { Err(KaslrError::Address { address }) }
    }

    /// Changes the N bytes at offset `at` of guest memory. Returns false if these bytes are not in the kernel.
    ///
    /// The function uses a raw pointer, because `VolatileSlice` takes ten times as long. The kernel has 80 000
    /// relocations.
    fn change<const N: usize>(&self, at: usize, change: impl Fn([u8; N]) -> [u8; N]) -> bool {
        let is_in_kernel = at.checked_add(N).is_some_and(|end| end <= self.len);
        if is_in_kernel {
            // SAFETY: the slice of guest memory from `start` has `len` bytes, and the caller of `randomize` keeps the
            // slice mapped. No vCPU exists yet, and no other thread accesses the kernel. Every address is aligned for
            // a byte array.
            unsafe {
                let pointer = self.start.add(at).cast::<[u8; N]>();
                pointer.write(change(pointer.read()));
            }
        }
        is_in_kernel
    }
}

/// Returns the offset and the length of the section [`SECTION`] of an ELF image, or `None` if there is no such section.
fn find_section(image: &File) -> io::Result<Option<(u64, u64)>> {
    let mut header = [0; 64];
    image.read_exact_at(&mut header, 0)?;
    // e_shoff, e_shentsize, e_shnum and e_shstrndx of `Elf64_Ehdr`.
    let headers = u64::from_le_bytes(field(&header, 0x28));
    let [entry_size, count, names] = [0x3a, 0x3c, 0x3e].map(|at| u64::from(u16::from_le_bytes(field(&header, at))));
    if entry_size != SECTION_HEADER as u64 {
        return Ok(None);
    }
    let section = |index: u64| {
        let mut section = [0; SECTION_HEADER];
        let offset = headers.checked_add(index * SECTION_HEADER as u64).ok_or(io::ErrorKind::InvalidData)?;
        image.read_exact_at(&mut section, offset)?;
        // sh_name, sh_offset and sh_size of `Elf64_Shdr`.
        let [offset, len] = [0x18, 0x20].map(|at| u64::from_le_bytes(field(&section, at)));
        io::Result::Ok((u64::from(u32::from_le_bytes(field(&section, 0))), offset, len))
    };
    if names >= count {
        return Ok(None);
    }
    let (_, names, _) = section(names)?;
    let file_len = image.metadata()?.len();
    for index in 0..count {
        let (name, offset, len) = section(index)?;
        let mut found = [0; SECTION.len()];
        let read = image.read_exact_at(&mut found, names.checked_add(name).ok_or(io::ErrorKind::InvalidData)?);
        if read.is_ok() && found == SECTION {
            let inside = offset.checked_add(len).is_some_and(|end| end <= file_len);
            return if inside { Ok(Some((offset, len))) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    }
    Ok(None)
}

/// Returns the field of N bytes at offset `at`. Returns zeros if the field is not in `bytes`.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).map_or([0; N], array)
}

/// Returns a slice of N bytes as an array. Returns zeros for a slice of another length.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    /// Guest-physical address of the end of the test's kernel.
    const END: u64 = (16 << 20) + 0x1000;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
    }

    /// Returns an ELF image with a section `name` that contains `table`.
    fn image(name: &[u8], table: &[u8]) -> File {
        let names = [b"\0", name, b"\0"].concat();
        let mut header = [0u8; 64];
        header[0x28..0x30].copy_from_slice(&64u64.to_le_bytes());
        for (at, value) in [(0x3a, 64u16), (0x3c, 3), (0x3e, 1)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        let section = |name: u32, offset: usize, len: usize| {
            let mut section = [0u8; 64];
            section[..4].copy_from_slice(&name.to_le_bytes());
            section[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            section[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            section
        };
        let data = 64 * 4;
        let sections = [section(0, 0, 0), section(0, data, names.len()), section(1, data + names.len(), table.len())];
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[&header[..], &sections.concat(), &names, table].concat()).unwrap();
        file
    }

    fn relocations(elements: &[u32]) -> File {
        let table: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
        image(b".husk.relocs", &table)
    }

    #[test]
    fn randomize_changes_the_numbers_of_each_list() {
        let memory = memory();
        let at = [16 << 20, (16 << 20) + 8, (16 << 20) + 13].map(GuestAddress);
        memory.write_obj(0xffff_ffff_8100_0000u64, at[0]).unwrap();
        memory.write_obj(0x8100_0000u32, at[1]).unwrap();
        memory.write_obj(0x8100_0000u32, at[2]).unwrap();
        let table = relocations(&[0, 0x8100_0000, 0, 0x8100_0008, 0, 0x8100_000d]);
        // The kernel has 504 possible positions.
        assert_eq!(randomize(&memory, &table, END, 504 * 7 + 3).unwrap(), Some(3 * ALIGN));
        assert_eq!(address_in_image(0xffff_ffff_8160_0000, 3 * ALIGN), 0xffff_ffff_8100_0000);
        assert_eq!(
            [0x1000, 0xffff_ffff_c000_0000].map(|at| address_in_image(at, ALIGN)),
            [0x1000, 0xffff_ffff_c000_0000]
        );
        assert_eq!(memory.read_obj::<u64>(at[0]).unwrap(), 0xffff_ffff_8160_0000);
        assert_eq!(memory.read_obj::<u32>(at[1]).unwrap(), 0x80a0_0000);
        assert_eq!(memory.read_obj::<u32>(at[2]).unwrap(), 0x8160_0000);
    }

    #[test]
    fn randomize_keeps_the_kernel_in_its_range() {
        for random in [0, 1, 503, 504, u64::MAX] {
            let memory = memory();
            let start = GuestAddress(16 << 20);
            memory.write_obj(0xffff_ffff_8100_0000u64, start).unwrap();
            randomize(&memory, &relocations(&[0, 0x8100_0000, 0, 0]), END, random).unwrap();
            let moved = memory.read_obj::<u64>(start).unwrap() - KERNEL_MAP;
            assert!(
                moved.is_multiple_of(ALIGN) && moved >= 16 << 20 && moved + 0x1000 <= IMAGE_RANGE,
                "the kernel's new offset {moved:#x} is not aligned, or is outside of the kernel's range"
            );
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a table of 32 768 relocations takes minutes")]
    fn randomize_reads_a_table_that_is_longer_than_a_chunk() {
        let memory = memory();
        let at = |index: usize| (16 << 20) + index as u32 * 4 % 0x1000;
        let mut elements = vec![0, 0, 0];
        elements.extend((0..2 * CHUNK / 4).map(|index| 0x8000_0000 + at(index)));
        assert_eq!(randomize(&memory, &relocations(&elements), END, 1).unwrap(), Some(ALIGN));
        // Each of the 1024 numbers has been increased 32 times, each time by 2 MiB.
        assert_eq!(memory.read_obj::<u32>(GuestAddress(16 << 20)).unwrap(), 32 * ALIGN as u32);
    }

    #[test]
    fn randomize_returns_nothing_without_relocations() {
        let memory = memory();
        assert_eq!(randomize(&memory, &image(b".husk.other!", &[1; 8]), END, 5).unwrap(), None);
        assert!(matches!(randomize(&memory, &tempfile::tempfile().unwrap(), END, 5), Err(KaslrError::Read(_))));
    }

    #[test]
    fn randomize_rejects_addresses_outside_the_kernel_and_invalid_lists() {
        let of = |elements: &[u32]| randomize(&memory(), &relocations(elements), END, 5);
        for address in [0x8100_1000, 0x8100_0ff9, 0x7fff_ffff, 1, 0xffff_ffff] {
            assert!(matches!(of(&[0, address]), Err(KaslrError::Address { .. })), "{address:#x} was accepted");
        }
        assert!(matches!(of(&[0x8100_0000]), Err(KaslrError::Format)));
        assert!(matches!(of(&[0, 0, 0, 0]), Err(KaslrError::Format)));
        of(&[]).unwrap();
    }

    proptest! {
        #[test]
        fn randomize_never_panics(bytes: Vec<u8>, table: Vec<u8>, random: u64) {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = randomize(&memory(), &file, END, random);
            let _ = randomize(&memory(), &image(b".husk.relocs", &table), END, random);
        }
    }
}
