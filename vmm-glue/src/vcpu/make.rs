//! Makes vCPUs in KVM: those of the start, and those that come when the pod grows.

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::arch::cpuid::{self, Machine};
use crate::arch::regs;

/// Why there is no vCPU.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// An ioctl of KVM failed.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A KVM structure could not be made.
    #[error("too many entries for KVM")]
    Fam(#[source] vmm_sys_util::fam::Error),
}

/// What every vCPU of a machine is made of.
pub struct Maker {
    vm: Arc<VmFd>,
    supported: Vec<kvm_cpuid_entry2>,
    machine: Machine,
}

impl Maker {
    /// For a machine, on a host whose KVM supports this CPUID.
    pub fn new(vm: Arc<VmFd>, supported: Vec<kvm_cpuid_entry2>, machine: Machine) -> Self {
        Self { vm, supported, machine }
    }

    /// Makes vCPU `id`; `entry` is where the boot processor starts, the others wait for its signal.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn make(&self, id: u8, entry: Option<u64>) -> Result<VcpuFd, MakeError> {
        let cpuid = cpuid::normalise(&self.supported, self.machine, id);
        create(&self.vm, id, &CpuId::from_entries(&cpuid).map_err(MakeError::Fam)?, entry)
    }

    /// How many there can be.
    pub fn most(&self) -> u8 {
        self.machine.vcpus
    }
}

/// Creates one vCPU with all its state; `entry` is where the boot processor starts, the others wait.
fn create(vm: &VmFd, id: u8, cpuid: &CpuId, entry: Option<u64>) -> Result<VcpuFd, MakeError> {
    let failed = |what| move |error| MakeError::Kvm(what, error);
    let vcpu = vm.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
    // CPUID first: it decides which model-specific registers there are.
    vcpu.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let msrs = regs::msrs().map_err(MakeError::Fam)?;
    // KVM stops at the first register this host does not know; the kernel lives without either.
    let written = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    if written < msrs.as_slice().len() {
        log::debug!("vCPU {id}: KVM took {written} of {} model-specific registers", msrs.as_slice().len());
    }
    vcpu.set_fpu(&regs::fpu()).map_err(failed("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    regs::wire_lint(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    if let Some(entry) = entry {
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        regs::long_mode(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs::general(entry)).map_err(failed("KVM_SET_REGS"))?;
    }
    Ok(vcpu)
}
