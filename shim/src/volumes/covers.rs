//! Covers: empty, read-only mounts at the places of the mounts that the shim leaves out of the share.
//!
//! The VMM has its own mount namespace. Without a cover, the place of a left-out mount would not be a mount point in
//! this namespace. A guest could then remove the directory or file there, or rename another one over it. The host's
//! kernel would detach the host's mount (`detach_mounts()` in fs/namespace.c). The check that gives EBUSY instead,
//! `is_local_mountpoint()`, only looks at the namespace of the caller.
//!
//! All covers of a sandbox are bind mounts of two directories and a file in the tmpfs of the staging directory.
//! Therefore, a cover needs no file system of its own, and the shim recognizes a cover by its device.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    libc::{S_IFDIR, S_IFMT},
    sys::stat::fstat,
};

use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_api;
use crate::volumes::mount_tree::Submount;
use crate::volumes::mountinfo::{self, Entry};
use crate::volumes::submounts::{mounted, open_below};

/// Subdirectory of the staging directory.
const COVERS: &str = "covers";
/// Source of the covers for mount points that are directories.
const DIRECTORY: &str = "directory";
/// Source of the covers for mount points that are files. For example, `ip netns` binds a network namespace (nsfs) to a
/// file.
const FILE: &str = "file";
/// Source of the covers for the sandbox's own mounts, such as the share.
const SANDBOX: &str = "sandbox";

/// The place of a left-out mount could not be covered.
#[derive(Debug, thiserror::Error)]
#[error("failed to cover {}, where a mount ({kind}) is left out", path.display())]
struct CoverError {
    path: PathBuf,
    kind: String,
    #[source]
    source: io::Error,
}

/// The covers of a sandbox.
pub struct Covers {
    dir: PathBuf,
}

impl Covers {
    /// Returns the covers in the staging directory `stage`.
    pub fn in_stage(stage: &Path) -> Self {
        Self { dir: stage.join(COVERS) }
    }

    /// Creates the directories and the file. Users of the guest may list and read them, as they may list `/proc`.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.dir)?;
        for name in [DIRECTORY, SANDBOX] {
            let dir = self.dir.join(name);
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o555))?;
        }
        fs::File::create_new(self.dir.join(FILE))?.set_permissions(fs::Permissions::from_mode(0o444))
    }

    /// Covers the place of `left_out` in the copy at `to`. `from` is the root of the staged tree that was copied.
    ///
    /// # Errors
    /// If the place is not covered, although the left-out mount is still there.
    pub fn cover_staged(
        &self,
        from: &OwnedFd,
        to: &Path,
        left_out: &Submount<'_>,
        host_only: &HostOnly,
    ) -> io::Result<()> {
        let Submount { path, entry, .. } = left_out;
        let is_there = || {
            let file = open_below(from, path)?;
            let id = mount_api::mount_id(file.as_fd())?;
            // A guest that shares the directory may have renamed a directory of the path.
            if id == entry.id { Ok(file) } else { Err(io::Error::other("the mount point was renamed")) }
        };
        let covered = is_there().and_then(|mount| {
            self.cover(&mount, host_only.is_of_sandbox(entry), to, path)?;
            // A rename may have raced with the lookup. Then the cover is not at the place of the mount.
            is_there().map(drop)
        });
        let Err(source) = covered else { return Ok(()) };
        // When the host removes a mount point, the kernel detaches the mount in the staging directory, too.
        let remains = mountinfo::read()?.iter().any(|now| (now.id, now.device) == (entry.id, entry.device));
        if !remains {
            return Ok(());
        }
        let (kind, path) = (entry.kind.clone(), Path::new("/").join(path));
        Err(io::Error::other(CoverError { path, kind, source }))
    }

    /// Covers `path` below the mount at `to`. `mount` is the root of the mount whose place is covered. Both `mount` and
    /// its mount point are directories, or neither is. Therefore, the type of `mount` selects the cover. Does nothing
    /// if `to` is not a mount point.
    pub fn cover(&self, mount: &OwnedFd, of_sandbox: bool, to: &Path, path: &Path) -> io::Result<()> {
        // The fd refers to the mount, not to the mount point. See `submounts::attach_copy`.
        let Some(to) = mounted(to)? else { return Ok(()) };
        let is_directory = fstat(mount)?.st_mode & S_IFMT == S_IFDIR;
        let name = match (of_sandbox, is_directory) {
            (true, _) => SANDBOX,
            (false, true) => DIRECTORY,
            (false, false) => FILE,
        };
        let source = mount_api::open_path(&self.dir.join(name), false)?;
        let cover = mount_api::clone_tree(source.as_fd(), false)?;
        mount_api::set_attributes(cover.as_fd(), mount_api::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE, false)?;
        mount_api::attach_to_share(cover.as_fd(), open_below(&to.file, path)?.as_fd())
    }
}

/// Returns whether `mount`, a submount of a volume in the share, is a cover.
pub fn is_cover(mount: &Entry, host_only: &HostOnly) -> bool {
    // Apart from covers, a volume in the share contains no mount of the sandbox's own file systems.
    host_only.is_of_sandbox(mount)
}

/// Returns whether `mount`, a submount of a volume in the share, covers the place of a mount of the sandbox. Such a
/// cover stays, because a receiving tree does not contain the mounts of the sandbox.
pub fn is_permanent(mount: &Entry, host_only: &HostOnly) -> bool {
    is_cover(mount, host_only) && mount.root.ends_with(Path::new(COVERS).join(SANDBOX))
}
