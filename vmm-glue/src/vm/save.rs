//! Saves a paused VM.

use std::fs::File;
use std::io::{self, Write};

use kvm_ioctls::VcpuFd;

use super::Vm;
use crate::config::BuildId;
use crate::snapshot::host::Host;
use crate::snapshot::memory::{self, FileId, MemoryStateError};
use crate::snapshot::platform::{self, PlatformError};
use crate::snapshot::state::{Machine, State, StateError, Values};
use crate::snapshot::touched::{self, Touched, TouchedError};
use crate::snapshot::vcpu::{self, VcpuStateError};
use crate::virtio::saved::SaveError as DeviceError;

/// Why a VM cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The VM was not built to be saved.
    #[error("failed to save the VM: its configuration does not have `saveable`")]
    NotSaveable,
    /// The VM runs.
    #[error("failed to save the VM: the VM must be paused first")]
    Running,
    /// A vCPU could not be saved.
    #[error("failed to save vCPU {0}")]
    Vcpu(usize, #[source] VcpuStateError),
    /// The interrupt controllers, the timer or the clock could not be saved.
    #[error("failed to save what KVM emulates")]
    Platform(#[from] PlatformError),
    /// A device could not be saved.
    #[error("failed to save the device in slot {0}")]
    Device(usize, #[source] DeviceError),
    /// The memory could not be saved.
    #[error(transparent)]
    Memory(#[from] MemoryStateError),
    /// The pages that the guest touches could not be recorded.
    #[error("failed to record the pages that the guest touches")]
    Touched(#[from] TouchedError),
    /// The state could not be encoded.
    #[error("failed to encode the state of the VM")]
    State(#[from] StateError),
    /// The state could not be written.
    #[error("failed to write the state of the VM")]
    Write(#[source] io::Error),
}

/// What is needed to save a VM. Only a VM whose configuration has `saveable` has it.
pub(crate) struct Saver {
    /// Further handles of the vCPUs.
    pub vcpus: Vec<VcpuFd>,
    /// The numbers of the model-specific registers to save.
    pub msrs: Vec<u32>,
    /// What the VM was built with.
    pub machine: Machine,
    /// What KVM offers.
    pub host: Host,
    /// The pagemap of this process, if the pages that the guest touches are recorded.
    pub pagemap: Option<File>,
}

impl Vm {
    /// Records from now on which pages the guest of the paused VM touches. [`Vm::save`] saves their addresses. `copy` is
    /// an empty file for the memory's content, and `pagemap` is `/proc/PID/pagemap` of this process.
    ///
    /// # Errors
    /// [`SaveError`]. The VM must then not go on.
    pub fn record_touched(&mut self, copy: File, pagemap: File) -> Result<(), SaveError> {
        let saver = self.saver.as_mut().ok_or(SaveError::NotSaveable)?;
        if self.running {
            return Err(SaveError::Running);
        }
        touched::begin(&self.memory, saver.machine.memory, copy)?;
        saver.pagemap = Some(pagemap);
        Ok(())
    }

    /// Saves the paused VM in two empty files: its memory, and then everything else.
    ///
    /// # Errors
    /// [`SaveError`]. The files are then not usable.
    pub fn save(&self, mut state: File, mut memory: File, build: &BuildId) -> Result<(), SaveError> {
        let Saver { vcpus, msrs, machine, host, pagemap } = self.saver.as_ref().ok_or(SaveError::NotSaveable)?;
        if self.running {
            return Err(SaveError::Running);
        }
        let save = |(id, vcpu)| vcpu::save(&self.kvm, vcpu, msrs).map_err(|error| SaveError::Vcpu(id, error));
        let vcpus = vcpus.iter().enumerate().map(save).collect::<Result<Vec<_>, _>>()?;
        // Saving the memory touches all of it.
        let touched = match pagemap {
            Some(pagemap) => touched::end(&self.memory, machine.memory, pagemap)?,
            None => Touched::default(),
        };
        let extents = memory::save(&self.memory, machine.memory, &mut memory)?;
        let saved = State {
            values: Values {
                machine: *machine,
                memory_file: FileId::of(&memory).map_err(MemoryStateError::Write)?,
                host: host.clone(),
                kernel_moved: self.kernel_moved,
                console: self.vcpus.console().state(),
            },
            vcpus,
            platform: platform::save(&self.kvm)?,
            devices: self.devices.save()?,
            memory: extents,
            touched,
        };
        state.write_all(&saved.to_bytes(build)?).map_err(SaveError::Write)
    }
}
