//! What a saved VM has seen of the host's CPU and KVM. The VM can only go on where it sees the same.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

/// CPUID leaves that depend on the CPU on which they are read: the topology (Intel SDM volume 2A "CPUID", AMD APM
/// volume 3 appendix E). The VMM computes these leaves itself ([`crate::arch::cpuid`]).
const TOPOLOGY: [u32; 4] = [0xb, 0x1f, 0x8000_001e, 0x8000_0026];
/// The local APIC's id in EBX of leaf 1.
const APIC_ID: u32 = 0xff << 24;

/// What KVM offers to VMs on this host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers that describe features, with their values.
    features: Vec<(u32, u64)>,
}

/// Error from reading what KVM offers.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A KVM ioctl failed.
    #[error("ioctl {0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// KVM has more registers than fit in a structure.
    #[error("failed to build a KVM structure: too many entries")]
    Fam(#[source] vmm_sys_util::fam::Error),
}

impl Host {
    /// Reads what KVM offers.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn read(kvm: &Kvm) -> Result<Self, HostError> {
        let failed = |what| move |error| HostError::Kvm(what, error);
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let numbers = kvm.get_msr_feature_index_list().map_err(failed("KVM_GET_MSR_FEATURE_INDEX_LIST"))?;
        let mut features = Vec::new();
        // KVM stops at a register that it cannot read, and the registers after it would be missing. Therefore, each
        // register is read by a call of its own.
        for &index in numbers.as_slice() {
            let entry = kvm_msr_entry { index, ..Default::default() };
            let mut msr = Msrs::from_entries(&[entry]).map_err(HostError::Fam)?;
            if kvm.get_msrs(&mut msr).map_err(failed("KVM_GET_MSRS"))? == 1 {
                features.extend(msr.as_slice().iter().map(|msr| (msr.index, msr.data)));
            }
        }
        Ok(Self { cpuid: without_topology(supported.as_slice()), features })
    }
}

fn without_topology(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = entries.iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).copied().collect();
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ebx &= !APIC_ID;
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_on_which_leaves_are_read_makes_no_difference() {
        let entry = |function, ebx| kvm_cpuid_entry2 { function, ebx, ..Default::default() };
        let read_on = |cpu: u32| without_topology(&[entry(0, 1), entry(1, cpu << 24 | 7), entry(0xb, cpu)]);
        assert_eq!(read_on(0), read_on(3));
        assert_ne!(read_on(0), without_topology(&[entry(0, 1), entry(1, 8)]));
    }
}
