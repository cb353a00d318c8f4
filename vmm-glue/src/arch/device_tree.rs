//! The device tree: vCPUs, interrupt controllers, virtio slots and the VM Generation ID, for a kernel without ACPI.
//!
//! x86 Linux accepts a flattened device tree as `setup_data`, and then does not need an MP table
//! (arch/x86/kernel/devicetree.c). The names `intel,ce4100-…` come from that file and stand for the interrupt
//! controllers of any PC. Without ACPI, only a device tree can describe a VM Generation ID
//! (Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml).

use vm_fdt::{Error, FdtWriter};

use super::layout;

/// Phandle of the I/O APIC, which is the interrupt parent of all nodes.
const IOAPIC_HANDLE: u32 = 1;
/// Second interrupt cell: edge-triggered, active high (index into `of_ioapic_type` of devicetree.c). Edge-triggered is
/// correct, because KVM's irqfd raises edges.
const EDGE_RISING: u32 = 3;

/// Builds the device tree blob. The vCPUs have the APIC ids 0 to `vcpus - 1`.
///
/// # Errors
/// None in practice, because the tree is well-formed for all arguments.
pub fn build(vcpus: u8, slots: u32) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", IOAPIC_HANDLE)?;
    // Without this property, the kernel ignores the tree.
    fdt.property_string("compatible", "husk,microvm")?;

    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for id in 0..vcpus {
        let cpu = fdt.begin_node(&format!("cpu@{id:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_u32("reg", id.into())?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)?;

    let lapic = fdt.begin_node(&format!("lapic@{:x}", layout::LAPIC))?;
    fdt.property_string("compatible", "intel,ce4100-lapic")?;
    fdt.property_array_u64("reg", &[layout::LAPIC.into(), 0x1000])?;
    // The node does not have `intel,virtual-wire-mode`. Therefore, the kernel leaves the legacy interrupt controller
    // connected to LINT0. The serial port's interrupts use that controller, because the tree does not describe the
    // serial port. The kernel finds the serial port without the device tree, because the port's legacy
    // address, 0x3f8, is built into the kernel.
    fdt.end_node(lapic)?;

    let ioapic = fdt.begin_node(&format!("ioapic@{:x}", layout::IOAPIC))?;
    fdt.property_string("compatible", "intel,ce4100-ioapic")?;
    fdt.property_array_u64("reg", &[layout::IOAPIC.into(), 0x1000])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("phandle", IOAPIC_HANDLE)?;
    fdt.end_node(ioapic)?;

    for slot in 0..slots {
        let address = layout::slot_address(slot);
        let node = fdt.begin_node(&format!("virtio@{address:x}"))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        fdt.property_array_u64("reg", &[address, layout::MMIO_SLOT])?;
        fdt.property_array_u32("interrupts", &[layout::slot_gsi(slot), EDGE_RISING])?;
        fdt.end_node(node)?;
    }

    let vmgenid = fdt.begin_node(&format!("vmgenid@{:x}", layout::VMGENID))?;
    fdt.property_string("compatible", "microsoft,vmgenid")?;
    fdt.property_array_u64("reg", &[layout::VMGENID, layout::VMGENID_LEN as u64])?;
    fdt.property_array_u32("interrupts", &[layout::VMGENID_GSI, EDGE_RISING])?;
    fdt.end_node(vmgenid)?;

    fdt.end_node(root)?;
    fdt.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_tree_fits_reserved_space() {
        for vcpus in [1, 64] {
            let tree = build(vcpus, layout::MAX_SLOTS as u32).unwrap();
            assert_eq!(tree[..4], [0xd0, 0x0d, 0xfe, 0xed]);
            assert_eq!(u32::from_be_bytes(tree[4..8].try_into().unwrap()) as usize, tree.len());
            assert!(tree.len() < layout::DEVICE_TREE_MAX);
        }
    }
}
