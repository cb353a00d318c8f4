//! Operations on mounts, which are identified by fds.

use std::{io, os::fd::BorrowedFd, path::Path};

use nix::mount::{MsFlags, mount};

pub use crate::host_view::open_path;
pub use husk_base::sys::mount::{MOUNT_ATTR_RDONLY, attach, clone_tree, mount_id, set_attributes, set_id_mapping};

/// Size of a page. mount(2) copies at most one page of options, including the terminating NUL.
const PAGE_SIZE: usize = 4096;

/// Attributes of every mount in the share. The attributes restrict only processes of the host: no device can be opened,
/// no program can be executed or gain privileges, and no symlink is followed. Without the attributes, a guest could
/// make the host's processes do these things with files that the guest has created.
///
/// The guest does not see these attributes. The flags of the guest's own mounts decide what a container may do.
const SHARED_ATTRIBUTES: u64 =
    libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSYMFOLLOW;
/// [`SHARED_ATTRIBUTES`] as flags of mount(2). nix has no MS_NOSYMFOLLOW.
pub const SHARED_FLAGS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW));

/// Sets [`SHARED_ATTRIBUTES`] on all mounts of the detached tree `tree`, and attaches the tree at `target` in the
/// share.
///
/// The function sets the attributes first, because the VMM sees a mount as soon as the mount is attached.
///
/// # Errors
/// The errors of mount_setattr(2) and move_mount(2). MOUNT_ATTR_NOSYMFOLLOW needs Linux 5.14.
pub fn attach_to_share(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(tree, SHARED_ATTRIBUTES, 0, true)?;
    attach(tree, target)
}

/// Mounts a file system with [`SHARED_FLAGS`]. mount(2) itself must set these flags, because the VMM sees a
/// new mount in the share at once. A later remount would set them too late.
///
/// # Errors
/// The error of mount(2), or an error if the options are too long for mount(2).
pub fn mount_in_share(source: &Path, target: &Path, kind: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    if data.len() >= PAGE_SIZE {
        let message = format!("the options have {} bytes, but the kernel accepts only {}", data.len(), PAGE_SIZE - 1);
        return Err(io::Error::other(message));
    }
    let flags = flags | SHARED_FLAGS;
    Ok(mount(Some(source), target, Some(kind), flags, Some(data).filter(|data| !data.is_empty()))?)
}
