//! Mounts the share, which contains the pod's files of the host.

use std::fs;
use std::io;

use husk_proto::{GUEST_SHARE, SHARE_TAG};
use nix::mount::{MsFlags, mount as mount_fs};

/// Reason why the share cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Failed to create the mount point.
    #[error("failed to create directory {GUEST_SHARE}")]
    Create(#[source] io::Error),
    /// Failed to mount the file system.
    #[error("failed to mount virtiofs at {GUEST_SHARE}")]
    Mount(#[source] nix::Error),
}

/// Mounts the share. Blocks until the VMM answers.
///
/// # Errors
/// [`ShareError`].
pub fn mount() -> Result<(), ShareError> {
    fs::create_dir_all(GUEST_SHARE).map_err(ShareError::Create)?;
    // MS_NODEV is not set, because containers can use device nodes in their rootfs, as with runc. BPF device programs
    // restrict the access to these nodes.
    mount_fs(Some(SHARE_TAG), GUEST_SHARE, Some("virtiofs"), MsFlags::empty(), None::<&str>).map_err(ShareError::Mount)
}
