//! Taking away what was mounted and created for a container.

use super::binds::{self, remove, unmount};
use std::{
    io,
    path::{Path, PathBuf},
};

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
    binds::release(share, id, &mut note);
    let mounts = binds::marks(share, id);
    let rootfs = dir.join("rootfs");
    note(&rootfs, unmount(&rootfs));
    for path in [&mounts, &rootfs, &dir] {
        note(path, remove(path));
    }
    first
}
