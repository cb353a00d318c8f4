//! Error that occurs while the shim makes a volume available to the guest.

use std::io;

use crate::volumes::memory_volume;

/// Error that occurs while the shim makes a volume available to the guest.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The mount is not supported.
    #[error("mount of {mount_source:?} at {destination:?}: {message}")]
    Unsupported {
        /// The mount's source.
        mount_source: String,
        /// The mount point in the container.
        destination: String,
        /// The reason, and the remedy.
        message: String,
    },
    /// The shim failed to prepare a memory volume.
    #[error("error mounting {mount_source:?} to rootfs at {destination:?}")]
    Memory {
        /// The mount's source.
        mount_source: String,
        /// The mount point in the container.
        destination: String,
        /// The cause.
        #[source]
        source: memory_volume::MemoryVolumeError,
    },
    /// An operation on the host failed.
    #[error("error mounting {mount_source:?} to rootfs at {destination:?}: failed to {step}")]
    Host {
        /// The mount's source.
        mount_source: String,
        /// The mount point in the container.
        destination: String,
        /// The operation that failed. The text completes the error message after "failed to".
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
