//! The user on whose behalf this process writes data to the host's file systems.
//!
//! A file system may let root use blocks that it reserves, so that the host still works when the disk is full. ext4 tells
//! root by the user (fs/ext4/balloc.c, `ext4_has_free_clusters`), and not only by CAP_SYS_RESOURCE. Therefore, no data
//! of a guest is written as root.

use std::io;

use virtiofsd::passthrough::credentials::{UnixCredentials, UnixCredentialsGuard};
use virtiofsd::soft_idmap::{GuestUid, HostGid, HostUid, Id};

/// The user who writes data for root of a guest (the kernel's `overflowuid`).
const NOBODY: u32 = 65534;

/// Makes this thread act as the guest's user `user`, or as `NOBODY` if the user is root, until the guard is dropped. The
/// thread keeps its capabilities, and the owner of files is not affected.
pub fn act_as(user: GuestUid) -> io::Result<Option<UnixCredentialsGuard>> {
    let user = if user.is_root() { NOBODY } else { user.into_inner() };
    UnixCredentials::new(HostUid::from(user), HostGid::from(0)).set()
}
