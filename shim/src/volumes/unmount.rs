//! Unmounts and removes mount points.

use std::{fs, io, path::Path};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

/// Maximum number of mounts stacked on one directory. This maximum bounds the loop.
const MAX_STACKED: usize = 4096;

/// Unmounts everything at `path`. Open files do not prevent the unmount, because it is lazy (MNT_DETACH).
pub fn unmount(path: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // `path` is no longer a mount point, or does not exist.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Removes a mount point: an empty directory or a file. Never removes a directory's contents, which may be user data.
pub fn remove(path: &Path) -> io::Result<()> {
    let ignore_not_found = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).or_else(ignore_not_found),
        Ok(_) => fs::remove_file(path).or_else(ignore_not_found),
        Err(error) => ignore_not_found(error),
    }
}
