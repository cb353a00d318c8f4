//! The staging directory, in which mount trees are prepared before they are attached to the share.
//!
//! The staging directory is invisible to the guest. To copy a tree, the shim first attaches the tree here, because
//! mountinfo lists only the submounts of attached mounts. The shim then copies the submounts one by one. It omits
//! host-only file systems, and submounts that no path lookup reaches.
//!
//! A volume with `rslave` propagation has a second tree here, the receiving tree, which stays and receives the host's
//! later mounts. [`crate::volumes::propagate`] copies these mounts to the share. Therefore, no host-only file system
//! gets into the share, and the host can unmount a file system on which a guest has open files.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_tree::Tree;
use crate::volumes::submounts::{copy_staged, detach, first_error, mounted};
use crate::volumes::{mount_api, mountinfo, unmount};

/// Subdirectory of the receiving trees. Each tree has the name of its volume in the share.
const RECEIVING: &str = "receiving";
/// Subdirectory of the trees that are being copied.
const COPYING: &str = "copying";

/// Number that names the next copy in the subdirectory `COPYING`.
static NEXT_COPY: AtomicU64 = AtomicU64::new(0);

/// The staging directory of a sandbox.
pub struct StagingDir {
    dir: PathBuf,
}

impl StagingDir {
    /// Returns the staging directory of the sandbox with this share. Both directories have the same parent directory.
    pub fn for_share(share: &Path) -> Self {
        Self { dir: share.with_file_name("stage") }
    }

    /// Returns the path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the sandbox's [`HostOnly`], which tells host-only file systems from other file systems.
    ///
    /// # Errors
    /// The errors of [`HostOnly::new`].
    pub fn host_only(&self, share: &Path) -> io::Result<HostOnly> {
        HostOnly::new([share, &self.dir])
    }

    /// Creates the subdirectories. The directory itself must be mounted before (see [`crate::volumes::Share`]).
    ///
    /// # Errors
    /// The error of mkdir(2).
    pub fn create(&self) -> io::Result<()> {
        [RECEIVING, COPYING].iter().try_for_each(|name| fs::create_dir(self.dir.join(name)))
    }

    /// Returns a detached, private copy of the detached mount tree `tree`, without host-only file systems. Also returns
    /// the mount points of the omitted mounts, relative to the tree, each with the reason for its omission.
    ///
    /// # Errors
    /// If a mount cannot be copied. The copied mounts are then removed from the staging directory.
    pub fn copy(&self, tree: &OwnedFd, host_only: &HostOnly) -> io::Result<(OwnedFd, Vec<String>)> {
        let dir = self.dir.join(COPYING).join(NEXT_COPY.fetch_add(1, Ordering::Relaxed).to_string());
        let (from, to) = (dir.join("from"), dir.join("to"));
        let copied = copy_in(tree, host_only, &dir, (&from, &to));
        let points = [&to, &from];
        let removed = points.iter().map(|point| unmount::unmount(point).and_then(|()| unmount::remove(point)));
        let points_removed = first_error(removed);
        let dir_removed = unmount::remove(&dir);
        let copied = copied?;
        points_removed.and(dir_removed).map(|()| copied)
    }

    /// Attaches `tree`, a slave of the host's mounts, as the receiving tree of volume `name`. The caller must remove it
    /// with [`StagingDir::remove_receiving`].
    ///
    /// # Errors
    /// If the tree cannot be attached. The mount point is then removed.
    pub fn attach_receiving(&self, tree: &OwnedFd, directory: bool, name: &str) -> io::Result<()> {
        let point = self.receiving_point(name.as_ref());
        if directory {
            fs::create_dir(&point)?;
        } else {
            fs::File::create_new(&point)?;
        }
        let attached = mount_api::open_path(&point, false).and_then(|to| mount_api::attach(tree.as_fd(), to.as_fd()));
        if attached.is_err() {
            // Best effort, because the error of attaching the tree is returned.
            let _ = unmount::remove(&point);
        }
        attached
    }

    /// Detaches the copies of the share and of the staging directory from the receiving tree of volume `name`.
    /// If these copies stayed, every later volume would propagate into each receiving tree. Best effort, because
    /// updates exclude copies that cannot be detached.
    ///
    /// The host's own mounts stay, even host-only mounts. If the host mounts something on one of these mounts later,
    /// the new mount propagates to the receiving tree only if the tree contains a copy of the older mount.
    pub fn detach_sandbox_mounts(&self, name: &str, host_only: &HostOnly) {
        if let (Ok(entries), Ok(Some(base))) = (mountinfo::read(), mounted(&self.receiving_point(name.as_ref())))
            && let Some(tree) = Tree::of(&entries, base.id)
        {
            for own in tree.reachable(|entry| host_only.is_of_sandbox(entry)).1 {
                let _ = detach(&base.file, &own);
            }
        }
    }

    /// Returns the names of the volumes with a receiving tree.
    ///
    /// # Errors
    /// The error of reading the directory.
    pub fn receiving(&self) -> io::Result<Vec<OsString>> {
        fs::read_dir(self.dir.join(RECEIVING))?.map(|entry| Ok(entry?.file_name())).collect()
    }

    /// Returns the mount point of the receiving tree of volume `name`.
    pub fn receiving_point(&self, name: &OsStr) -> PathBuf {
        self.dir.join(RECEIVING).join(name)
    }

    /// Removes the receiving tree of volume `name`, if there is one.
    ///
    /// # Errors
    /// The error of umount2(2), unlink(2) or rmdir(2).
    pub fn remove_receiving(&self, name: &OsStr) -> io::Result<()> {
        let point = self.receiving_point(name);
        unmount::unmount(&point)?;
        unmount::remove(&point)
    }
}

fn copy_in(
    tree: &OwnedFd,
    host_only: &HostOnly,
    dir: &Path,
    (from, to): (&Path, &Path),
) -> io::Result<(OwnedFd, Vec<String>)> {
    for dir in [dir, from, to] {
        fs::create_dir(dir)?;
    }
    mount_api::attach(tree.as_fd(), mount_api::open_path(from, false)?.as_fd())?;
    let from = mounted(from)?.ok_or(io::ErrorKind::NotFound)?;
    let base = mount_api::clone_tree(from.file.as_fd(), false)?;
    mount_api::set_attributes(base.as_fd(), 0, libc::MS_PRIVATE, false)?;
    mount_api::attach(base.as_fd(), mount_api::open_path(to, false)?.as_fd())?;
    let entries = mountinfo::read()?;
    let tree = Tree::of(&entries, from.id).ok_or(io::ErrorKind::NotFound)?;
    let (reachable, left_out) = tree.reachable(|entry| host_only.contains(entry));
    let describe = |path: &Path, reason: &str| format!("{} ({reason})", Path::new("/").join(path).display());
    let mut left_out: Vec<String> = left_out.iter().map(|out| describe(&out.path, &out.entry.kind)).collect();
    let mut unreachable: Vec<&Path> = Vec::new();
    for submount in &reachable {
        if unreachable.iter().any(|path| submount.path.starts_with(path)) {
            continue;
        }
        // If a submount cannot be copied, omit it instead of failing. The mount point may be in a file system whose
        // server has died, or a guest may have moved the mount point below a path that is too long.
        if let Err(error) = copy_staged(&from.file, to, submount) {
            unreachable.push(&submount.path);
            if error.kind() != io::ErrorKind::NotFound {
                left_out.push(describe(&submount.path, &error.to_string()));
            }
        }
    }
    Ok((mount_api::clone_tree(mount_api::open_path(to, false)?.as_fd(), true)?, left_out))
}
