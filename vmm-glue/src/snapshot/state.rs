//! Everything of a saved VM except its memory, and its form in a file.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::format::{self, FormatError, Kind, Section};
use super::host::Host;
use super::memory::{Extent, FileId};
use super::platform::PlatformState;
use super::touched::Touched;
use super::vcpu::VcpuState;
use crate::config::BuildId;
use crate::serial::ConsoleState;
use crate::virtio::saved::SavedDevice;

/// Maximum length of the file.
pub const MAX_LEN: u64 = 1 << 20;

/// What the VM was built with. A VM is only restored into a VM that is built in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Guest memory at boot in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Maximum number of vCPUs.
    pub max_vcpus: u8,
    /// Number of virtio-mmio slots.
    pub slots: u32,
}

/// Values of the VM that are not in its vCPUs or devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Values {
    /// What the VM was built with.
    pub machine: Machine,
    /// The file with the memory.
    pub memory_file: FileId,
    /// What KVM offered.
    pub host: Host,
    /// Number of bytes by which the kernel was moved.
    pub kernel_moved: u64,
    /// The registers of the console.
    pub console: ConsoleState,
}

/// The state of a VM.
pub struct State {
    /// Values of the VM.
    pub values: Values,
    /// The vCPUs, by their number.
    pub vcpus: Vec<VcpuState>,
    /// What KVM emulates for the whole VM.
    pub platform: PlatformState,
    /// The device in each slot, if there is one.
    pub devices: Vec<Option<SavedDevice>>,
    /// The parts of guest memory.
    pub memory: Vec<Extent>,
    /// The pages that the guest will read and write soon.
    pub touched: Touched,
}

/// Error from reading or writing a state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file's format is not valid.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The content of a section is not valid.
    #[error("the content of the section {0:?} is not valid")]
    Content(Kind, #[source] postcard::Error),
}

impl State {
    /// Returns the bytes of the file.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn to_bytes(&self, build: &BuildId) -> Result<Vec<u8>, StateError> {
        let Self { values, vcpus, platform, devices, memory, touched } = self;
        let contents = [
            encode(Kind::Machine, values)?,
            encode(Kind::Vcpus, vcpus)?,
            encode(Kind::Platform, platform)?,
            encode(Kind::Devices, devices)?,
            encode(Kind::Memory, memory)?,
            encode(Kind::Touched, touched)?,
        ];
        let sections: Vec<_> = contents.iter().map(|(kind, content)| Section { kind: *kind, content }).collect();
        Ok(format::write(build, &sections)?)
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn from_bytes(build: &BuildId, bytes: &[u8]) -> Result<Self, StateError> {
        let sections = format::read(build, bytes)?;
        Ok(Self {
            values: decode(&sections, Kind::Machine)?,
            vcpus: decode(&sections, Kind::Vcpus)?,
            platform: decode(&sections, Kind::Platform)?,
            devices: decode(&sections, Kind::Devices)?,
            memory: decode(&sections, Kind::Memory)?,
            touched: decode(&sections, Kind::Touched)?,
        })
    }
}

fn encode(kind: Kind, value: &impl Serialize) -> Result<(Kind, Vec<u8>), StateError> {
    postcard::to_allocvec(value).map(|content| (kind, content)).map_err(|error| StateError::Content(kind, error))
}

fn decode<T: DeserializeOwned>(sections: &[Section<'_>], kind: Kind) -> Result<T, StateError> {
    let section = sections.iter().find(|section| section.kind == kind).ok_or(FormatError::Count(kind))?;
    let (value, rest) = postcard::take_from_bytes(section.content).map_err(|error| StateError::Content(kind, error))?;
    if rest.is_empty() { Ok(value) } else { Err(FormatError::Trailing.into()) }
}
