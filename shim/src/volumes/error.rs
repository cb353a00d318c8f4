//! Why a volume cannot be given to the guest.

use crate::volumes::memory_volume;
use std::io;

/// Why a volume cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It asks for something that cannot cross into a virtual machine.
    #[error("mount of {mount_source:?} at {destination:?}: {message}")]
    Unsupported {
        /// The mount's source.
        mount_source: String,
        /// Where in the container.
        destination: String,
        /// Why not, and what to do.
        message: String,
    },
    /// A volume in memory cannot be made in the guest.
    #[error("error mounting {mount_source:?} to rootfs at {destination:?}")]
    Memory {
        /// The mount's source.
        mount_source: String,
        /// Where in the container.
        destination: String,
        /// Why not.
        #[source]
        source: memory_volume::MemoryVolumeError,
    },
    /// The host refused.
    #[error("error mounting {mount_source:?} to rootfs at {destination:?}: cannot {step}")]
    Host {
        /// The mount's source.
        mount_source: String,
        /// Where in the container.
        destination: String,
        /// What failed.
        step: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
