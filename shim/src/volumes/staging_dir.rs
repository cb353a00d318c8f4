//! The staging directory, where the shim prepares mount trees for the share. The guest cannot see this directory.
//!
//! To copy a tree, the shim first attaches the tree here, because the mount list contains only attached mounts. The
//! shim then copies the submounts one by one. The copy omits host-only file systems, and submounts that no path lookup
//! reaches. The place of each omitted host-only file system gets a cover ([`crate::volumes::covers`]).
//!
//! A volume with `rslave` propagation has a receiving tree here. The host's later mounts propagate to this tree, and
//! [`crate::volumes::propagate`] copies these mounts to the share. If the host's mounts propagated directly to the
//! share, host-only file systems would get into the share. In addition, the host's umount(2) would fail with EBUSY
//! while the guest has open files on the mount.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::errno::Errno;
use nix::sys::stat::fstat;

use crate::host_view::{HostView, path_of};
use crate::volumes::covers::Covers;
use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_tree::Tree;
use crate::volumes::submounts::{copy_staged, detach, first_error, mounted, open_below};
use crate::volumes::{mount_api, mountinfo, unmount};

/// Subdirectory of the receiving trees. A receiving tree has the same name as its volume in the share.
const RECEIVING: &str = "receiving";
/// Subdirectory in which the shim copies mount trees.
const COPYING: &str = "copying";

/// Names of the directories on which the sandbox's own file systems are mounted: the share, twice, and the staging
/// directory.
const OWN_DIRECTORIES: [&str; 3] = ["share", "guest", "stage"];

/// Name of the directory in `COPYING` for the next copy.
static NEXT_COPY: AtomicU64 = AtomicU64::new(0);

/// A copy of a mount tree, which is detached and private.
pub struct CopiedTree {
    /// The copy.
    pub tree: OwnedFd,
    /// The path of each omitted mount, with the reason.
    pub left_out: Vec<String>,
    /// Whether the copy is a single mount without a cover, and the source's mount is not id-mapped.
    pub is_single: bool,
}

/// Values that are necessary to copy a mount tree of the host.
#[derive(Debug, Clone, Copy)]
pub struct CopyContext<'a> {
    /// Recognizes host-only file systems, which are not copied.
    pub host_only: &'a HostOnly,
    /// Resolves the host's paths.
    pub host: &'a HostView,
}

/// The staging directory of a sandbox.
pub struct StagingDir {
    dir: PathBuf,
}

impl StagingDir {
    /// Returns the staging directory, which has the same parent directory as `share`.
    pub fn for_share(share: &Path) -> Self {
        Self { dir: share.with_file_name("stage") }
    }

    /// Returns the path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns a [`HostOnly`] that includes the file systems of `share` and of the staging directory.
    ///
    /// # Errors
    /// The errors of [`HostOnly::new`].
    pub fn host_only(&self, share: &Path) -> io::Result<HostOnly> {
        HostOnly::new([share, &self.dir])
    }

    /// Creates the subdirectories and the covers. The tmpfs of the staging directory must be mounted (see
    /// [`crate::volumes::Share`]).
    ///
    /// # Errors
    /// The error of mkdir(2), open(2) or chmod(2).
    pub fn create(&self) -> io::Result<()> {
        [RECEIVING, COPYING].iter().try_for_each(|name| fs::create_dir(self.dir.join(name)))?;
        self.covers().create()
    }

    /// Returns the covers for the mounts that are left out of the share.
    pub fn covers(&self) -> Covers {
        Covers::in_stage(&self.dir)
    }

    /// Copies the detached mount tree `tree` without host-only file systems, and covers their places and those of the
    /// sandbox's own mounts. `source` is the root of the tree on the host.
    ///
    /// # Errors
    /// If the tree's root cannot be copied, the place of a host-only file system cannot be covered, or the temporary
    /// mounts cannot be removed.
    pub fn copy(&self, tree: &OwnedFd, source: &OwnedFd, context: CopyContext<'_>) -> io::Result<CopiedTree> {
        let dir = self.dir.join(COPYING).join(NEXT_COPY.fetch_add(1, Ordering::Relaxed).to_string());
        let (from, to) = (dir.join("from"), dir.join("to"));
        let copied = self.copy_in(tree, source, context, &dir);
        let points = [&to, &from];
        let removed = points.iter().map(|point| unmount::unmount(point).and_then(|()| unmount::remove(point)));
        let points_removed = first_error(removed);
        let dir_removed = unmount::remove(&dir);
        let copied = copied?;
        points_removed.and(dir_removed).map(|()| copied)
    }

    /// Attaches `tree`, a slave of the host's mounts, as the receiving tree of volume `name`. The caller must later
    /// call [`StagingDir::remove_receiving`].
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
            // Best effort, because the caller gets the error of the failed attach.
            let _ = unmount::remove(&point);
        }
        attached
    }

    /// Detaches copies of the share and of the staging directory from the receiving tree of volume `name`. Otherwise,
    /// every later mount in the share would propagate to the receiving tree. Best effort, because
    /// [`crate::volumes::propagate::update`] excludes these copies.
    ///
    /// Host-only mounts of the host, such as `/proc`, stay attached. Otherwise, the receiving tree would not receive
    /// mounts with which the host later covers a host-only mount.
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

    fn copy_in(
        &self,
        tree: &OwnedFd,
        source: &OwnedFd,
        context: CopyContext<'_>,
        dir: &Path,
    ) -> io::Result<CopiedTree> {
        let (from, to, covers, host_only) = (dir.join("from"), dir.join("to"), self.covers(), context.host_only);
        for dir in [dir, &from, &to] {
            fs::create_dir(dir)?;
        }
        mount_api::attach(tree.as_fd(), mount_api::open_path(&from, false)?.as_fd())?;
        let from = mounted(&from)?.ok_or(io::ErrorKind::NotFound)?;
        let base = mount_api::clone_tree(from.file.as_fd(), false)?;
        mount_api::set_attributes(base.as_fd(), 0, libc::MS_PRIVATE, false)?;
        mount_api::attach(base.as_fd(), mount_api::open_path(&to, false)?.as_fd())?;
        let entries = mountinfo::read()?;
        let tree = Tree::of(&entries, from.id).ok_or(io::ErrorKind::NotFound)?;
        let (reachable, excluded) = tree.reachable(|entry| host_only.contains(entry));
        let describe = |path: &Path, reason: &str| format!("{} ({reason})", Path::new("/").join(path).display());
        let mut left_out: Vec<String> = excluded.iter().map(|out| describe(&out.path, &out.entry.kind)).collect();
        let mut unreachable: Vec<&Path> = Vec::new();
        for submount in &reachable {
            if unreachable.iter().any(|path| submount.path.starts_with(path)) {
                continue;
            }
            // Omit a submount that cannot be copied. For example, the server of the file system with the mount point
            // may have died.
            if let Err(error) = copy_staged(&from.file, &to, submount) {
                unreachable.push(&submount.path);
                if error.kind() != io::ErrorKind::NotFound {
                    left_out.push(describe(&submount.path, &error.to_string()));
                }
            }
        }
        for submount in &excluded {
            // If the mount around the place was not copied, the guest cannot reach the place.
            if !unreachable.iter().any(|path| submount.path.starts_with(path)) {
                covers.cover_staged(&from.file, &to, submount, host_only)?;
            }
        }
        self.cover_own_directories(source, (&from.file, &to), context)?;
        let copied = mount_api::open_path(&to, false)?;
        let (id, entries) = (mount_api::mount_id(copied.as_fd())?, mountinfo::read()?);
        let is_single = !entries.iter().any(|entry| entry.parent == id || entry.id == id && entry.id_mapped);
        Ok(CopiedTree { tree: mount_api::clone_tree(copied.as_fd(), true)?, left_out, is_single })
    }

    /// Covers the places of the sandbox's own mounts in the copy at `to` of the tree at `from`. `source` is the root of
    /// the tree on the host. These mounts are only in the shim's namespace. Without a cover, a guest could remove their
    /// mount points, and the kernel would detach the mounts.
    fn cover_own_directories(
        &self,
        source: &OwnedFd,
        (from, to): (&OwnedFd, &Path),
        CopyContext { host_only, host }: CopyContext<'_>,
    ) -> io::Result<()> {
        let root = fs::read_link(path_of(source))?;
        for place in OWN_DIRECTORIES.map(|name| self.dir.with_file_name(name)) {
            let Ok(path) = place.strip_prefix(&root) else { continue };
            // In the copy, another mount or a symlink may be on the path. Then the path leads elsewhere, or nowhere.
            let (Some(copied), Some(place)) = (on_path(open_below(from, path))?, on_path(host.open(&place, false))?)
            else {
                continue;
            };
            let (copied_stat, stat) = (fstat(&copied)?, fstat(&place)?);
            let is_place = (copied_stat.st_dev, copied_stat.st_ino) == (stat.st_dev, stat.st_ino);
            if is_place && !path.as_os_str().is_empty() && !host_only.is_device_of_sandbox(stat.st_dev) {
                self.covers().cover(&copied, true, to, path)?;
            }
        }
        Ok(())
    }
}

/// Returns `None` if the path leads elsewhere or nowhere. Any other error is returned, because a place that cannot be
/// opened now must not stay without its cover.
fn on_path(opened: io::Result<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    match opened.map_err(|error| (error.raw_os_error().map(Errno::from_raw), error)) {
        Ok(file) => Ok(Some(file)),
        Err((Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV), _)) => Ok(None),
        Err((_, error)) => Err(error),
    }
}
