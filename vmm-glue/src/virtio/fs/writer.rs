//! The user on whose behalf this process writes data to the host's file systems.
//!
//! A file system may let root use blocks that it reserves, so that the host still works when the disk is full. ext4
//! recognizes root by the user, and not only by CAP_SYS_RESOURCE (fs/ext4/balloc.c, `ext4_has_free_clusters`). Therefore
//! the VMM writes data as the user who writes in the guest. As under runc, only root of a container can use these blocks.

use std::io;

use virtiofsd::passthrough::credentials::{UnixCredentials, UnixCredentialsGuard};
use virtiofsd::soft_idmap::{GuestUid, HostGid, HostUid, Id};

/// Makes this thread act as the guest's user `user` until the guard is dropped. The thread keeps its capabilities, and
/// the owner of the file is not affected.
pub fn act_as(user: GuestUid) -> io::Result<Option<UnixCredentialsGuard>> {
    UnixCredentials::new(HostUid::from(user.into_inner()), HostGid::from(0)).set()
}
