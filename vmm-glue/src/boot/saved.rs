//! Builds the parts of a VM from those of a saved VM.

use std::fs::File;
use std::io::{self, Read};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::boot_timing::BootTiming;
use crate::config::BuildId;
use crate::guest_memory::GuestMemory;
use crate::serial::Console;
use crate::snapshot::host::{Host, HostError};
use crate::snapshot::memory::{self, FileId, MemoryStateError};
use crate::snapshot::platform::{self, PlatformError};
use crate::snapshot::prefault::Prefault;
use crate::snapshot::state::{MAX_LEN, Machine, State, StateError};
use crate::snapshot::vcpu::{self, VcpuStateError};
use crate::virtio::slots::{RestoreSlotError, Slots};

/// Why a saved VM cannot go on. A VM can then be booted instead.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file with the state could not be read.
    #[error("failed to read the state of the saved VM")]
    Read(#[source] io::Error),
    /// The state is too long.
    #[error("the state of the saved VM has more than {MAX_LEN} bytes")]
    Long,
    /// The state is not valid.
    #[error("the state of the saved VM cannot be used")]
    State(#[from] StateError),
    /// The file with the memory is not that of the state.
    #[error("the memory of the saved VM does not belong to its state, or has another length")]
    OtherMemory,
    /// The memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryStateError),
    /// The saved VM was built with another configuration.
    #[error("the saved VM has the configuration {saved:?}, but {wanted:?} is needed")]
    Machine {
        /// The saved configuration.
        saved: Machine,
        /// The configuration of this VM.
        wanted: Machine,
    },
    /// What KVM offers could not be read.
    #[error("failed to read what KVM offers")]
    Host(#[from] HostError),
    /// KVM offers something else than to the saved VM.
    #[error("the saved VM was booted on another CPU, with other microcode, or with other parameters of KVM")]
    OtherHost,
    /// A vCPU could not be created.
    #[error("failed to create vCPU {0}")]
    Create(u64, #[source] kvm_ioctls::Error),
    /// A vCPU could not be restored.
    #[error("failed to restore vCPU {0}")]
    Vcpu(u64, #[source] VcpuStateError),
    /// The interrupt controllers, the timer or the clock could not be restored.
    #[error("failed to restore what KVM emulates")]
    Platform(#[from] PlatformError),
    /// The console could not be restored.
    #[error("failed to restore the console")]
    Console(#[source] io::Error),
    /// A device could not be restored.
    #[error(transparent)]
    Slot(#[from] RestoreSlotError),
}

/// A saved VM, whose memory has been mapped.
pub struct Saved(State);

impl Saved {
    /// Reads the state, checks that it fits this host, and maps the memory over `ram`.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn load(
        (state, memory): (File, &File),
        build: &BuildId,
        kvm: &Kvm,
        ram: &GuestMemory,
        timing: &mut BootTiming,
    ) -> Result<Self, RestoreError> {
        let mut bytes = Vec::new();
        state.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(RestoreError::Read)?;
        if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_LEN) {
            return Err(RestoreError::Long);
        }
        let state = State::from_bytes(build, &bytes)?;
        timing.step("read state");
        if state.values.host != Host::read(kvm)? {
            return Err(RestoreError::OtherHost);
        }
        timing.step("compare host");
        if state.values.memory_file != FileId::of(memory).map_err(RestoreError::Read)? {
            return Err(RestoreError::OtherMemory);
        }
        memory::map(ram, &state.memory, memory)?;
        Ok(Self(state))
    }

    /// Checks that the saved VM was built like this one.
    ///
    /// # Errors
    /// [`RestoreError::Machine`].
    pub fn check(&self, wanted: Machine) -> Result<(), RestoreError> {
        let saved = self.0.values.machine;
        let is_same = saved == wanted && self.0.vcpus.len() == usize::from(wanted.vcpus);
        if is_same { Ok(()) } else { Err(RestoreError::Machine { saved, wanted }) }
    }

    /// Returns the number of bytes by which the kernel was moved.
    pub fn kernel_moved(&self) -> u64 {
        self.0.values.kernel_moved
    }

    /// Creates and restores the vCPUs.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore_vcpus(&self, vm: &VmFd) -> Result<Vec<VcpuFd>, RestoreError> {
        let restore = |(id, state)| {
            let vcpu = vm.create_vcpu(id).map_err(|error| RestoreError::Create(id, error))?;
            vcpu::restore(vm, &vcpu, state).map_err(|error| RestoreError::Vcpu(id, error))?;
            Ok(vcpu)
        };
        (0u64..).zip(&self.0.vcpus).map(restore).collect()
    }

    /// Starts to map memory that the guest will access soon. Best effort. `None` if there is no vCPU.
    pub fn prefault(&self, ram: &GuestMemory, vcpus: &[VcpuFd]) -> Option<Prefault> {
        vcpus.first().map(|vcpu| Prefault::start(ram, vcpu, &self.0.touched))
    }

    /// Restores everything but the vCPUs and the memory.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(&self, vm: &VmFd, slots: &Slots, console: &Console) -> Result<(), RestoreError> {
        let State { values, platform, devices, .. } = &self.0;
        platform::restore(vm, platform)?;
        console.restore(&values.console).map_err(RestoreError::Console)?;
        Ok(slots.restore(devices)?)
    }
}
