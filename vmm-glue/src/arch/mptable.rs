//! The MP table: tells a kernel without ACPI its processors and interrupt wiring.
//!
//! Layout after Intel's MultiProcessor Specification 1.4, chapter 4.

use super::layout;

const FLOATING_LEN: u32 = 16;
const HEADER_LEN: usize = 44;
/// Version of the specification, "1.4".
const SPEC: u8 = 4;
/// Version register of the local APIC as KVM has it.
const LAPIC_VERSION: u8 = 0x14;
/// Version register of the I/O APIC as KVM has it.
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
const INT_NMI: u8 = 1;
const INT_EXTINT: u8 = 3;

/// The bytes to place at [`layout::MP_TABLE`]; processors have the APIC ids 0 to `vcpus - 1`.
pub fn build(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries: Vec<u8> = Vec::with_capacity(20 * usize::from(vcpus) + 8 * 28);
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOTSTRAP } else { CPU_ENABLED };
        let mut cpu = [0u8; 20];
        cpu[1] = id;
        cpu[2] = LAPIC_VERSION;
        cpu[3] = flags;
        add(&cpu);
    }
    add(&[1, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    add(&[2, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    for pin in 0..layout::GSIS as u8 {
        // Polarity and trigger as on the ISA bus: edge, active high. KVM's irqfd raises edges.
        add(&[3, 0, 0, 0, 0, pin, ioapic_id, pin]);
    }
    add(&[4, INT_EXTINT, 0, 0, 0, 0, 0, 0]);
    add(&[4, INT_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[SPEC, 0]);
    header.extend_from_slice(b"HUSK    MICROVM     ");
    header.extend_from_slice(&[0; 6]); // no OEM table
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LAPIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // no extended entries
    header[7] = checksum(&[&header, &entries]);

    let mut table = Vec::with_capacity(FLOATING_LEN as usize + header.len() + entries.len());
    table.extend_from_slice(b"_MP_");
    table.extend_from_slice(&(layout::MP_TABLE as u32 + FLOATING_LEN).to_le_bytes());
    table.extend_from_slice(&[1, SPEC, 0, 0, 0, 0, 0, 0]);
    table[10] = checksum(&[&table]);
    table.extend_from_slice(&header);
    table.extend_from_slice(&entries);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    parts.iter().flat_map(|part| part.iter()).fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_and_lengths_are_right_for_every_size() {
        for vcpus in 1..=64 {
            let table = build(vcpus);
            assert_eq!(sum(&table[..16]), 0);
            let length = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert_eq!(length, table.len() - 16);
            assert_eq!(sum(&table[16..]), 0);
            let entries = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 24 + 2);
            assert!((table.len() as u64) < layout::HIGH_RAM - layout::MP_TABLE);
        }
    }
}
