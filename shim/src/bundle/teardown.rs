//! Taking away what was mounted and created for a container.

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Nobody stacks more mounts on one directory; a bound so that a bug cannot loop.
const MAX_STACKED: usize = 64;

/// What is left of a container.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove {}", path.display())]
pub struct TeardownError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Unmounts and removes everything of container `id` under `share`; any number of times.
///
/// # Errors
/// The first thing that stayed; everything else is tried nevertheless.
pub fn teardown(share: &Path, id: &str) -> Result<(), TeardownError> {
    let dir = share.join(id);
    let mut first = Ok(());
    let mut note = |path: &Path, result: io::Result<()>| {
        if let (Err(source), Ok(())) = (result, &first) {
            first = Err(TeardownError { path: path.into(), source });
        }
    };
    let mounts = dir.join("mounts");
    match fs::read_dir(&mounts) {
        Ok(entries) => {
            for path in entries.flatten().map(|entry| entry.path()) {
                let result = unmount(&path).and_then(|()| remove(&path));
                note(&path, result);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => note(&mounts, Err(error)),
    }
    let rootfs = dir.join("rootfs");
    note(&rootfs, unmount(&rootfs));
    for path in [&mounts, &rootfs, &dir] {
        note(path, remove(path));
    }
    first
}

/// Unmounts whatever is mounted at `path`, detached, so that a file held open does not keep it.
fn unmount(path: &Path) -> io::Result<()> {
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
fn remove(path: &Path) -> io::Result<()> {
    let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path).or_else(gone),
        Ok(_) => fs::remove_file(path).or_else(gone),
        Err(error) => gone(error),
    }
}
