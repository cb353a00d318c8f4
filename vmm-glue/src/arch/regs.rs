//! CPU state at the kernel's entry point: long mode, with an identity mapping of the first GiB.
//!
//! The 64-bit boot protocol requires this state (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): flat
//! segments, and paging that maps the kernel and the zero page. Interrupts are disabled, and RSI points to the zero
//! page.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::guest_memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PTE_PRESENT_WRITE: u64 = 3;
const PDE_HUGE: u64 = 1 << 7;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Enables the MTRRs, and makes memory write-back unless the page tables set another type.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// Segment descriptors: null, 64-bit code, data, task state.
const GDT: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Writes the global descriptor table and the page tables.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (address, entry) in (layout::GDT..).step_by(8).zip(GDT) {
        memory.write_obj(entry, GuestAddress(address))?;
    }
    let (pdpt, pd) = (layout::PML4 + 0x1000, layout::PML4 + 0x2000);
    memory.write_obj(pdpt | PTE_PRESENT_WRITE, GuestAddress(layout::PML4))?;
    memory.write_obj(pd | PTE_PRESENT_WRITE, GuestAddress(pdpt))?;
    let mut entries = [0u8; 4096];
    for (entry, page) in entries.chunks_exact_mut(8).zip(0u64..) {
        entry.copy_from_slice(&((page << 21) | PTE_PRESENT_WRITE | PDE_HUGE).to_le_bytes());
    }
    memory.write_slice(&entries, GuestAddress(pd))
}

/// Returns the boot vCPU's general registers.
pub fn general_registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rflags: 2, // the bit that is always one
        ..Default::default()
    }
}

/// Changes the boot vCPU's system registers from the reset state to long mode.
pub fn set_long_mode(sregs: &mut kvm_sregs) {
    let code = segment(1);
    let data = segment(2);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(u16::MAX);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = segment(3);
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// Returns the segment register that results from loading descriptor `index`.
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT.get(usize::from(index)).copied().unwrap_or(0);
    let bit = |shift: u32| (descriptor >> shift & 1) as u8;
    let limit = (descriptor & 0xffff) as u32 | (descriptor >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (descriptor >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        unusable: 1 - bit(47),
        padding: 0,
    }
}

/// Returns the FPU state after FNINIT, with all SSE exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Returns the model-specific registers that firmware would set.
///
/// # Errors
/// None in practice, because the list is short.
pub fn msrs() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ])
}

/// Connects the local APIC's pins in the way that an MP table usually describes: LINT0 to the PIC, and LINT1 to NMI.
pub fn set_lint(lapic: &mut kvm_lapic_state) {
    for (offset, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
        if let Some(register) = lapic.regs.get_mut(offset..offset + 4) {
            for (byte, value) in register.iter_mut().zip(mode.to_le_bytes()) {
                *byte = value.cast_signed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_first_gib() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(layout::PML4), (layout::PML4 + 0x1000) | 3);
        assert_eq!(read(layout::PML4 + 0x1000), (layout::PML4 + 0x2000) | 3);
        for page in [0u64, 1, 8, 511] {
            assert_eq!(read(layout::PML4 + 0x2000 + page * 8), page << 21 | 0x83);
        }
        assert_eq!(read(layout::GDT + 8), GDT[1]);
    }

    #[test]
    fn code_and_data_segments_are_flat() {
        let code = segment(1);
        assert_eq!((code.base, code.limit, code.l, code.db, code.type_), (0, u32::MAX, 1, 0, 0xb));
        let data = segment(2);
        assert_eq!((data.base, data.limit, data.l, data.db, data.type_), (0, u32::MAX, 0, 1, 3));
        assert_eq!((segment(3).type_, segment(3).s, segment(3).present), (0xb, 0, 1));
    }
}
