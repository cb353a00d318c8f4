//! Unmounting and removing mount points.

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use std::{fs, io, path::Path};

/// Maximum number of mounts stacked on one directory. It bounds the loop.
const MAX_STACKED: usize = 64;

/// Unmounts whatever is mounted at `path`, detached, so that a file held open does not keep it.
pub fn unmount(path: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Removes an empty directory or a file that was mounted on: never anything below, which could be somebody's data.
pub fn remove(path: &Path) -> io::Result<()> {
    let ignore_not_found = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).or_else(ignore_not_found),
        Ok(_) => fs::remove_file(path).or_else(ignore_not_found),
        Err(error) => ignore_not_found(error),
    }
}
