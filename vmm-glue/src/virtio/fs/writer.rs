//! Makes a VMM thread act as a guest's user while the thread writes data to the host's file systems.
//!
//! A file system can reserve blocks for root, so that the host still works when the disk is full. ext4 recognizes root
//! by the user id or by CAP_SYS_RESOURCE (fs/ext4/balloc.c, `ext4_has_free_clusters`). Therefore, the VMM writes data
//! with the user id of the guest's user. As under runc, only a container's root user can use the reserved blocks.

use std::io;

use virtiofsd::passthrough::credentials::{UnixCredentials, UnixCredentialsGuard};
use virtiofsd::soft_idmap::{GuestUid, HostGid, HostUid, Id};

/// Makes this thread act as the guest's user `user` until the guard is dropped. The thread keeps its capabilities,
/// because the jail has set SECBIT_NO_SETUID_FIXUP. A write does not change the owner of the file.
pub fn act_as(user: GuestUid) -> io::Result<Option<UnixCredentialsGuard>> {
    UnixCredentials::new(HostUid::from(user.into_inner()), HostGid::from(0)).set()
}
