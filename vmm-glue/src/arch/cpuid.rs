//! Computes the guest's CPUID: the entries that KVM supports on this host, adapted to the VM's vCPUs.
//!
//! For leaf numbers and fields, see Intel SDM volume 2A "CPUID" and AMD APM volume 3 appendix E. For leaf 0x4000_0001,
//! see Documentation/virt/kvm/x86/cpuid.rst of Linux.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX1_MONITOR: u32 = 1 << 3;
const ECX1_VMX: u32 = 1 << 5;
const ECX1_X2APIC: u32 = 1 << 21;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const EXT1_ECX_SVM: u32 = 1 << 2;
/// The three bits that offer asynchronous page faults. This feature helps only if the host swaps guest memory. On older
/// host kernels, the feature causes a storm of VM exits.
const KVM_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Properties of the VM with which CPUID has to agree.
#[derive(Debug, Clone, Copy)]
pub struct CpuidConfig {
    /// Number of vCPUs. Their APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// Whether KVM emulates the TSC deadline timer.
    pub tsc_deadline: bool,
}

/// Returns the CPUID entries of vCPU `id`, derived from the entries that KVM supports on this host.
pub fn normalise(supported: &[kvm_cpuid_entry2], config: CpuidConfig, id: u8) -> Vec<kvm_cpuid_entry2> {
    let vcpus = u32::from(config.vcpus);
    let id = u32::from(id);
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported.iter().filter(|entry| keep(entry.function)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | vcpus << 16 | id << 24;
                entry.ecx &= !(ECX1_MONITOR | ECX1_VMX | ECX1_TSC_DEADLINE);
                entry.ecx |= ECX1_X2APIC | ECX1_HYPERVISOR;
                if config.tsc_deadline {
                    entry.ecx |= ECX1_TSC_DEADLINE;
                }
                entry.edx = if vcpus > 1 { entry.edx | EDX1_HTT } else { entry.edx & !EDX1_HTT };
            }
            // The next two leaves describe caches. Each vCPU has its own caches of level 1 and 2. All vCPUs share the
            // other caches.
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << id_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1u32 << id_bits) - 1).min(63) << 26;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { vcpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x4000_0001 => entry.eax &= !KVM_ASYNC_PF,
            // A pod's guest does not get nested virtualization.
            0x8000_0001 => entry.ecx &= !EXT1_ECX_SVM,
            // This leaf contains the number of cores, and the number of APIC id bits that identify a core.
            0x8000_0008 => entry.ecx = id_bits << 12 | (vcpus - 1),
            // This leaf contains the APIC id. The values say that each core has one thread, and that the VM has one
            // NUMA node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    // In the leaf for extended topology, every vCPU is a core of the single package.
    if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: id,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, 1));
        entries.push(level(1, id_bits, vcpus, 2));
        entries.push(level(2, 0, 0, 0));
    }
    entries
}

/// Returns whether a leaf is passed to the guest.
fn keep(function: u32) -> bool {
    !matches!(
        function,
        0x5                 // MONITOR
        | 0xa               // performance counters: a side channel from the host to the guest
        | 0xb | 0x1f        // topology: `normalise` adds its own leaf 0xb
        | 0x12              // SGX
        | 0x14              // processor trace
        | 0x15 | 0x16       // clock frequencies of the host: wrong in an emulated node, where kvmclock is correct
        | 0x8000_000a       // SVM
        | 0x8000_001b       // instruction based sampling
        | 0x8000_001f       // memory encryption
        | 0x8000_0022       // performance counters
        | 0x8000_0026 // topology
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax: 0x1f, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX, ..Default::default() }
    }

    #[test]
    fn normalise_sets_ids_and_drops_hidden_leaves() {
        let supported: Vec<_> = [0, 1, 0xa, 0xb, 0x15, 0x16, 0x4000_0001, 0x8000_0001, 0x8000_0008].map(leaf).to_vec();
        let config = CpuidConfig { vcpus: 3, tsc_deadline: false };
        for id in 0..3u8 {
            let entries = normalise(&supported, config, id);
            let find = |function| entries.iter().find(|entry| entry.function == function);
            assert!(find(0xa).is_none() && find(0x15).is_none() && find(0x16).is_none());
            let one = find(1).unwrap();
            assert_eq!(one.ebx >> 24, u32::from(id));
            assert_eq!(one.ebx >> 16 & 0xff, 3);
            assert_eq!(one.ecx & (ECX1_TSC_DEADLINE | ECX1_VMX), 0);
            assert_ne!(one.ecx & ECX1_HYPERVISOR, 0);
            let levels: Vec<_> = entries.iter().filter(|entry| entry.function == 0xb).collect();
            assert_eq!(levels.len(), 3);
            assert!(levels.iter().all(|level| level.edx == u32::from(id)));
            assert_eq!((levels[1].eax, levels[1].ebx), (2, 3));
            assert_eq!(find(0x8000_0008).unwrap().ecx, 2 << 12 | 2);
            assert_eq!(find(0x8000_0001).unwrap().ecx & EXT1_ECX_SVM, 0);
        }
    }

    #[test]
    fn single_vcpu_is_not_a_hyperthread() {
        let entries = normalise(&[leaf(0), leaf(1)], CpuidConfig { vcpus: 1, tsc_deadline: true }, 0);
        let one = entries.iter().find(|entry| entry.function == 1).unwrap();
        assert_eq!(one.edx & EDX1_HTT, 0);
        assert_ne!(one.ecx & ECX1_TSC_DEADLINE, 0);
    }
}
