//! Fuzzes the data that the VMM writes for the guest kernel: the device tree, the memory map and the command line. A
//! tenant chooses the VM's number of vCPUs and its memory size. The node's configuration can also permit tenants to
//! choose kernel parameters.

use husk_vmm::arch::{boot_params, device_tree, layout};
use husk_vmm::guest_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::input::input;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    vcpus: u8,
    slots: u8,
    memory_mib: u64,
    initrd: u64,
    initrd_len: u64,
    kaslr: bool,
    parameters: String,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(mut input) = input::<Input>(bytes) else { return };
    // Apply the VMM's limits to the input. In the VMM, `config_check` limits the number of vCPUs, the memory size and
    // the characters of the kernel parameters. `boot::build` limits the length of the command line, and puts the initrd
    // into the RAM after the kernel. `write` refuses an initrd whose address or length does not fit into 32 bits.
    input.parameters.retain(|char| (' '..='~').contains(&char));
    input.parameters.truncate(layout::CMDLINE_MAX - 1);
    let memory_mib = 64 + input.memory_mib % (4 << 20);
    let slots = usize::from(input.slots) % (layout::MAX_SLOTS + 1);
    let tree = device_tree::build(input.vcpus % 65, slots as u32).expect("build the device tree");
    assert!(tree.len() < layout::DEVICE_TREE_MAX);
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), layout::HIGH_RAM as usize)]).expect("create guest memory");
    let data = boot_params::BootData {
        memory: memory_mib << 20,
        cmdline: &input.parameters,
        initrd: input.initrd & 0xffff_ffff,
        initrd_len: input.initrd_len & 0xffff_ffff,
        device_tree: &tree,
        seed: [0; boot_params::SEED_LEN],
        kaslr: input.kaslr,
    };
    boot_params::write(&memory, &data).expect("write boot data");
    // The command line must end with a NUL byte. No RAM range may overlap the hole below 4 GiB.
    let end: u8 = memory
        .read_obj(GuestAddress(layout::CMDLINE + input.parameters.len() as u64))
        .expect("read the end of the command line");
    assert_eq!(end, 0, "the command line does not end with a NUL byte");
    let mut total = 0;
    for (start, len) in layout::ram(memory_mib << 20) {
        assert!(
            start + len <= layout::HOLE_START || start >= layout::HOLE_END,
            "the RAM range at {start:#x} overlaps the hole"
        );
        total += len;
    }
    assert_eq!(total, memory_mib << 20, "the RAM ranges do not have the size of the VM's memory");
}
