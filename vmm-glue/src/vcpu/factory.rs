//! Creates vCPUs in KVM, at boot and when the pod grows.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::arch::cpuid::{self, CpuidConfig};
use crate::arch::regs;

/// Error from creating a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum CreateVcpuError {
    /// A KVM ioctl failed.
    #[error("ioctl {0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The fd of a vCPU could not be duplicated.
    #[error("failed to duplicate the fd of a vCPU")]
    Copy(#[source] io::Error),
    /// A KVM structure with a variable number of entries could not be allocated.
    #[error("failed to build a KVM structure: too many entries")]
    Fam(#[source] vmm_sys_util::fam::Error),
}

/// Creates the vCPUs of one VM. The CPUIDs of these vCPUs differ only in the vCPU's id.
pub struct VcpuFactory {
    vm: Arc<VmFd>,
    supported: Vec<kvm_cpuid_entry2>,
    config: CpuidConfig,
}

impl VcpuFactory {
    /// Creates a factory for one VM. `supported` is the CPUID that the host's KVM supports.
    pub fn new(vm: Arc<VmFd>, supported: Vec<kvm_cpuid_entry2>, config: CpuidConfig) -> Self {
        Self { vm, supported, config }
    }

    /// Creates vCPU `id`. `entry` is the boot vCPU's entry point. The other vCPUs wait for the boot vCPU's startup
    /// interprocessor interrupt.
    pub fn create(&self, id: u8, entry: Option<u64>) -> Result<VcpuFd, CreateVcpuError> {
        let cpuid = cpuid::normalise(&self.supported, self.config, id);
        create_vcpu(&self.vm, id, &CpuId::from_entries(&cpuid).map_err(CreateVcpuError::Fam)?, entry)
    }

    /// Returns another handle of a vCPU, to save its state. The vCPU must not run while the handle is used.
    ///
    /// # Errors
    /// [`CreateVcpuError::Copy`].
    pub fn copy(&self, vcpu: &VcpuFd) -> Result<VcpuFd, CreateVcpuError> {
        // SAFETY: `vcpu` keeps its fd open during the call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let copy = fd.try_clone_to_owned().map_err(CreateVcpuError::Copy)?;
        // SAFETY: the fd is that of a vCPU of this VM, and `into_raw_fd` gives up its ownership. Therefore, the new
        // `VcpuFd` is the only owner and closes the fd once.
        unsafe { self.vm.create_vcpu_from_rawfd(copy.into_raw_fd()) }
            .map_err(|error| CreateVcpuError::Kvm("mmap of a vCPU", error))
    }

    /// Returns the maximum number of vCPUs.
    pub fn max(&self) -> u8 {
        self.config.vcpus
    }
}

/// Creates a vCPU and sets all its state. `entry` is the boot vCPU's entry point.
fn create_vcpu(vm: &VmFd, id: u8, cpuid: &CpuId, entry: Option<u64>) -> Result<VcpuFd, CreateVcpuError> {
    let failed = |what| move |error| CreateVcpuError::Kvm(what, error);
    let vcpu = vm.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
    // Set CPUID first, because CPUID decides which model-specific registers exist.
    vcpu.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let msrs = regs::msrs().map_err(CreateVcpuError::Fam)?;
    // KVM stops at the first register that this host does not support. A partial result is not an error, because the
    // guest kernel does not need these registers.
    let written = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    if written < msrs.as_slice().len() {
        log::debug!("vCPU {id}: KVM has set only {written} of {} model-specific registers", msrs.as_slice().len());
    }
    vcpu.set_fpu(&regs::fpu()).map_err(failed("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    regs::set_lint(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    if let Some(entry) = entry {
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        regs::set_long_mode(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs::general_registers(entry)).map_err(failed("KVM_SET_REGS"))?;
    }
    Ok(vcpu)
}
