//! The state of a vCPU: what KVM returns, in the order in which KVM has to be asked, and how it is set again.
//!
//! The order is that of Documentation/virt/kvm/api.rst: KVM_GET_MP_STATE first, because it applies pending INIT and
//! SIPI events, and KVM_GET_VCPU_EVENTS last. The local APIC is set before the model-specific registers, because KVM
//! accepts a TSC deadline only if the timer of the local APIC is in this mode.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// Number of registers that one call reads or writes (KVM's MAX_IO_MSRS).
const MSRS_AT_ONCE: usize = 256;
/// The time-stamp counter (arch/x86/include/asm/msr-index.h).
const TSC: u32 = 0x10;
/// The deadline of the local APIC's timer.
const TSC_DEADLINE: u32 = 0x6e0;
/// Registers that are not saved (first, last): performance counters, which guests do not have; registers that describe
/// the host's CPU, which KVM sets from the CPUID; and the registers of Hyper-V.
const NOT_SAVED: [(u32, u32); 16] = [
    (0xc1, 0xc8),
    (0x10a, 0x10a),
    (0x179, 0x179),
    (0x186, 0x18d),
    (0x309, 0x30c),
    (0x345, 0x345),
    (0x38d, 0x390),
    (0x3f1, 0x3f2),
    (0x480, 0x493),
    (0x4c1, 0x4c8),
    (0xc000_0300, 0xc000_0303),
    (0xc001_0000, 0xc001_0007),
    (0xc001_0055, 0xc001_0058),
    (0xc001_0200, 0xc001_020b),
    (0xc001_1029, 0xc001_102b),
    (0x4000_0000, 0x4000_01ff),
];

/// Error from saving or restoring a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// A KVM ioctl failed.
    #[error("ioctl {0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A KVM structure has too many entries.
    #[error("failed to build a KVM structure: too many entries")]
    Fam(#[source] vmm_sys_util::fam::Error),
    /// The state of the floating-point unit is larger than the structure of KVM_GET_XSAVE.
    #[error("this host's KVM needs {0} bytes for the state of the floating-point unit, but 4096 bytes are supported")]
    Xsave(i32),
    /// KVM did not set a model-specific register.
    #[error("this host's KVM refuses the saved value of model-specific register {0:#x}")]
    Msr(u32),
    /// The vCPU's clock has another frequency.
    #[error("the TSC of this host has {host} kHz, and that of the saved vCPU has {saved} kHz")]
    Frequency {
        /// The host's frequency.
        host: u32,
        /// The saved frequency.
        saved: u32,
    },
}

/// The state of a vCPU.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Floats,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// The state of the floating-point unit.
#[derive(Debug, Serialize, Deserialize)]
struct Floats(Box<kvm_xsave>);

impl PartialEq for Floats {
    fn eq(&self, other: &Self) -> bool {
        self.0.region == other.0.region
    }
}

/// Returns the numbers of the model-specific registers to save, in the order in which they are set.
///
/// # Errors
/// [`VcpuStateError::Kvm`].
pub fn saved_msrs(kvm: &Kvm) -> Result<Vec<u32>, VcpuStateError> {
    let all = kvm.get_msr_index_list().map_err(|error| VcpuStateError::Kvm("KVM_GET_MSR_INDEX_LIST", error))?;
    Ok(sorted(all.as_slice()))
}

fn sorted(all: &[u32]) -> Vec<u32> {
    let is_saved = |msr: u32| !NOT_SAVED.iter().any(|&(first, last)| (first..=last).contains(&msr));
    let mut saved: Vec<u32> = all.iter().copied().filter(|&msr| is_saved(msr)).collect();
    // The TSC comes before the deadline, which KVM compares with the TSC.
    saved.sort_by_key(|&msr| match msr {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    saved
}

/// Saves the state of a vCPU that does not run. `msrs` are the numbers of [`saved_msrs`]. Leaves out registers that this
/// vCPU does not have.
///
/// # Errors
/// [`VcpuStateError`].
pub fn save(vm: &VmFd, vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, VcpuStateError> {
    let failed = |what| move |error| VcpuStateError::Kvm(what, error);
    check_xsave(vm)?;
    let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let xsave = Floats(Box::new(vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?));
    let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    let debug = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?.as_slice().to_vec();
    let msrs = with_deadline(read_msrs(vcpu, msrs)?);
    let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
    Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug, lapic, cpuid, msrs, events, tsc_khz })
}

/// Sets the state of a new vCPU.
///
/// # Errors
/// [`VcpuStateError`]. The vCPU must not run after an error.
pub fn restore(vm: &VmFd, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    let failed = |what| move |error| VcpuStateError::Kvm(what, error);
    check_xsave(vm)?;
    let host = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
    if host != state.tsc_khz {
        return Err(VcpuStateError::Frequency { host, saved: state.tsc_khz });
    }
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(VcpuStateError::Fam)?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(state.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.sregs).map_err(failed("KVM_SET_SREGS"))?;
    // SAFETY: `check_xsave` has checked that KVM reads only the 4096 bytes of this structure.
    unsafe { vcpu.set_xsave(&state.xsave.0) }.map_err(failed("KVM_SET_XSAVE"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&state.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&state.lapic).map_err(failed("KVM_SET_LAPIC"))?;
    for msrs in state.msrs.chunks(MSRS_AT_ONCE) {
        let written =
            vcpu.set_msrs(&Msrs::from_entries(msrs).map_err(VcpuStateError::Fam)?).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(refused) = msrs.get(written) {
            return Err(VcpuStateError::Msr(refused.index));
        }
    }
    vcpu.set_vcpu_events(&state.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
}

/// Checks that KVM_GET_XSAVE returns the whole state, and that KVM_SET_XSAVE reads no more than its structure. The state
/// is larger only if the process has asked for features such as AMX (arch_prctl(2)).
fn check_xsave(vm: &VmFd) -> Result<(), VcpuStateError> {
    let size = vm.check_extension_int(Cap::Xsave2);
    if usize::try_from(size).is_ok_and(|size| size <= size_of::<kvm_xsave>()) {
        Ok(())
    } else {
        Err(VcpuStateError::Xsave(size))
    }
}

fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut all = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(MSRS_AT_ONCE));
        let entries: Vec<_> = now.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(VcpuStateError::Fam)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(|error| VcpuStateError::Kvm("KVM_GET_MSRS", error))?;
        all.extend(msrs.as_slice().iter().take(read));
        // KVM stops at a register that this vCPU does not have.
        let skipped = usize::from(read < now.len());
        if let Some(msr) = now.get(read) {
            log::debug!("model-specific register {msr:#x} is not saved: this vCPU does not have it");
        }
        rest = rest.get(read + skipped..).unwrap_or_default();
    }
    Ok(all)
}

/// KVM reads a deadline that has passed as 0, although the guest may not have got its interrupt. Setting the deadline to
/// the saved TSC makes the timer fire at once. A guest without a deadline ignores the interrupt.
fn with_deadline(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let tsc = msrs.iter().find(|msr| msr.index == TSC).map(|msr| msr.data);
    if let (Some(tsc), Some(deadline)) = (tsc, msrs.iter_mut().find(|msr| msr.index == TSC_DEADLINE))
        && deadline.data == 0
    {
        deadline.data = tsc;
    }
    msrs
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
    use kvm_ioctls::VcpuExit;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::guest_memory::GuestMemory;
    use crate::snapshot::{memory, platform};

    /// Port to which the guest writes.
    const PORT: u16 = 0x80;
    /// Address of the program, and of its counter.
    const PROGRAM: u64 = 0x1000;
    const COUNTER: u64 = 0x3000;
    /// In real mode: `inc word [0x3000]; inc bx; out 0x80, al; jmp` to the start.
    const CODE: [u8; 9] = [0xff, 0x06, 0x00, 0x30, 0x43, 0xe6, 0x80, 0xeb, 0xf7];

    /// A VM with one vCPU.
    struct Machine {
        kvm: Kvm,
        vm: VmFd,
        vcpu: VcpuFd,
        memory: GuestMemory,
    }

    impl Machine {
        fn new(content: impl FnOnce(&GuestMemory)) -> Self {
            let kvm = Kvm::new().unwrap();
            let vm = kvm.create_vm().unwrap();
            vm.set_tss_address(crate::arch::layout::KVM_TSS).unwrap();
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
            content(&memory);
            crate::memory::register(&vm, &memory).unwrap();
            let vcpu = vm.create_vcpu(0).unwrap();
            Self { kvm, vm, vcpu, memory }
        }

        /// Creates a VM whose vCPU is at the start of the program.
        fn at_program() -> Self {
            let machine = Self::new(|memory| memory.write_slice(&CODE, GuestAddress(PROGRAM)).unwrap());
            let cpuid = machine.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
            machine.vcpu.set_cpuid2(&cpuid).unwrap();
            let mut sregs = machine.vcpu.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector, sregs.ds.base, sregs.ds.selector) = (0, 0, 0, 0);
            machine.vcpu.set_sregs(&sregs).unwrap();
            machine.vcpu.set_regs(&kvm_regs { rip: PROGRAM, rflags: 2, ..Default::default() }).unwrap();
            machine
        }

        /// Runs the program until it has written to the port `count` times. Returns the counter.
        fn run(&mut self, count: usize) -> u16 {
            for _ in 0..count {
                match self.vcpu.run().unwrap() {
                    VcpuExit::IoOut(PORT, _) => {}
                    other => panic!("unexpected exit: {other:?}"),
                }
            }
            // Complete the last instruction.
            self.vcpu.set_kvm_immediate_exit(1);
            assert!(self.vcpu.run().is_err());
            self.vcpu.set_kvm_immediate_exit(0);
            self.memory.read_obj(GuestAddress(COUNTER)).unwrap()
        }

        fn save(&self) -> VcpuState {
            save(&self.vm, &self.vcpu, &saved_msrs(&self.kvm).unwrap()).unwrap()
        }
    }

    #[test]
    fn restored_vm_goes_on_where_the_saved_one_was() {
        let mut first = Machine::at_program();
        assert_eq!(first.run(3), 3);
        let state = postcard::to_allocvec(&first.save()).unwrap();
        let platform = postcard::to_allocvec(&platform::save(&first.vm).unwrap()).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let extents = memory::save(&first.memory, u64::MAX, &mut file).unwrap();
        for _ in 0..2 {
            let mut second = Machine::new(|memory| memory::map(memory, &extents, &file).unwrap());
            let state: VcpuState = postcard::from_bytes(&state).unwrap();
            restore(&second.vm, &second.vcpu, &state).unwrap();
            platform::restore(&second.vm, &postcard::from_bytes(&platform).unwrap()).unwrap();
            let again = second.save();
            assert_eq!((again.regs, again.sregs, &again.cpuid), (state.regs, state.sregs, &state.cpuid));
            assert_eq!((&again.xsave, again.xcrs, again.mp_state), (&state.xsave, state.xcrs, state.mp_state));
            assert_eq!(second.run(2), 5);
            assert_eq!(second.vcpu.get_regs().unwrap().rbx, 5);
        }
        assert_eq!(first.run(1), 4);
    }

    #[test]
    fn registers_of_the_guest_are_restored() {
        const KERNEL_GS_BASE: u32 = 0xc000_0102;
        let first = Machine::at_program();
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry(KERNEL_GS_BASE, 0x1234)]).unwrap();
        assert_eq!(first.vcpu.set_msrs(&msrs).unwrap(), 1);
        let state = first.save();
        let second = Machine::new(|_| {});
        restore(&second.vm, &second.vcpu, &state).unwrap();
        assert_eq!(read_msrs(&second.vcpu, &[KERNEL_GS_BASE]).unwrap()[0].data, 0x1234);
    }

    #[test]
    fn other_frequency_is_refused() {
        let first = Machine::at_program();
        let mut state = first.save();
        state.tsc_khz += 1;
        let error = restore(&first.vm, &first.vcpu, &state).unwrap_err();
        assert!(matches!(error, VcpuStateError::Frequency { .. }), "{error}");
    }

    #[test]
    fn registers_that_describe_the_host_are_not_saved() {
        let all = [TSC_DEADLINE, 0xc1, 0x10a, 0x174, 0x480, 0x493, 0x494, 0x4000_0001, 0x4b56_4d01, TSC];
        assert_eq!(sorted(&all), [TSC, 0x174, 0x494, 0x4b56_4d01, TSC_DEADLINE]);
    }

    #[test]
    fn deadline_that_has_passed_fires_at_once() {
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let data = |msrs: Vec<kvm_msr_entry>| with_deadline(msrs).last().unwrap().data;
        assert_eq!(data(vec![entry(TSC, 77), entry(TSC_DEADLINE, 0)]), 77);
        assert_eq!(data(vec![entry(TSC, 77), entry(TSC_DEADLINE, 99)]), 99);
    }
}
