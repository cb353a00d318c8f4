//! Fuzzes the ELF image of the guest kernel and the image's table of relocations. The first 8 bytes of an input are the
//! random number that determines the kernel's address.

use std::os::unix::fs::FileExt;

use husk_vmm::arch::kaslr;
use husk_vmm::arch::layout::HIGH_RAM;
use husk_vmm::guest_memory::GuestMemory;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use crate::driver::memory_file;

/// Size of guest memory in bytes.
const MEMORY: usize = 4 << 20;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some((random, image)) = bytes.split_first_chunk::<8>() else { return };
    let mut file = memory_file(image.len() as u64);
    file.write_all_at(image, 0).expect("write the image");
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("create guest memory");
    let random = u64::from_le_bytes(*random);
    // `husk_vmm::boot::build` makes the same two calls.
    match Elf::load(&memory, None, &mut file, Some(GuestAddress(HIGH_RAM))) {
        Ok(loaded) => drop(kaslr::randomize(&memory, &file, loaded.kernel_end, random)),
        // Test the relocations even if `Elf::load` rejects the image. Otherwise, the fuzzer would first have to find a
        // valid program header.
        Err(_) => drop(kaslr::randomize(&memory, &file, MEMORY as u64, random)),
    }
}
