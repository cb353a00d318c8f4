//! Operations on mounts, which are identified by fds.

use std::{io, os::fd::OwnedFd, path::Path};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

pub use husk_base::sys::mount::{MOUNT_ATTR_RDONLY, attach, clone_tree, mount_id, set_attributes, set_id_mapping};

/// Opens `path` with O_PATH. If `follow` is true, follows a symlink in the final component.
///
/// # Errors
/// The errors of open(2).
pub fn open_path(path: &Path, follow: bool) -> io::Result<OwnedFd> {
    let no_follow = if follow { OFlag::empty() } else { OFlag::O_NOFOLLOW };
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | no_follow, Mode::empty())?)
}
