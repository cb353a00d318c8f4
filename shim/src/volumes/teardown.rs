//! Removes a container's mounts and directories from the host.

use std::{
    io,
    path::{Path, PathBuf},
};

use husk_vmm::config::{HOST_ROOTFS, ROOTFS};

use crate::volumes::shared_mounts;
use crate::volumes::unmount::{remove, unmount};

/// Error from removing a container's files and mounts.
#[derive(Debug, thiserror::Error)]
#[error("failed to remove {}", path.display())]
pub struct TeardownError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Unmounts and removes everything in `share` that belongs to container `id`. May be called repeatedly.
///
/// # Errors
/// The first error. After an error, the call continues with the remaining steps.
pub fn teardown(share: &Path, id: &str) -> Result<(), TeardownError> {
    let dir = share.join(id);
    let mut first = Ok(());
    let mut keep_first_error = |path: &Path, result: io::Result<()>| {
        if let (Err(source), Ok(())) = (result, &first) {
            first = Err(TeardownError { path: path.into(), source });
        }
    };
    shared_mounts::release(share, id, &mut keep_first_error);
    let markers = shared_mounts::markers_dir(share, id);
    let roots = [ROOTFS, HOST_ROOTFS].map(|name| dir.join(name));
    for rootfs in &roots {
        keep_first_error(rootfs, unmount(rootfs));
    }
    for path in roots.iter().chain([&markers, &dir]) {
        keep_first_error(path, remove(path));
    }
    first
}
