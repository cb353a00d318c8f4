//! Unmounts and removes mount points.

use std::{fs, io, path::Path};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

/// Maximum number of mounts that [`unmount`] removes from one path.
const MAX_STACKED: usize = 4096;

/// Unmounts all mounts that are stacked at `path`. Open files do not prevent the lazy unmount (MNT_DETACH).
pub fn unmount(path: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // `path` is not a mount point, or does not exist.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Removes the file or empty directory at `path`. Succeeds if `path` does not exist. Never removes a directory's
/// contents, which may be user data.
pub fn remove(path: &Path) -> io::Result<()> {
    let ignore_not_found = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).or_else(ignore_not_found),
        Ok(_) => fs::remove_file(path).or_else(ignore_not_found),
        Err(error) => ignore_not_found(error),
    }
}
