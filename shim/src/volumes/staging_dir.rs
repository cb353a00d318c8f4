//! The staging directory: mount trees are prepared in it before they are attached to the share.
//!
//! It is invisible to the guest. Submounts are copied one by one, so a tree is attached here first: mountinfo lists the
//! submounts of attached mounts only. Only submounts that a path lookup reaches are copied, without host-only file
//! systems.
//!
//! A volume with `rslave` propagation has a second tree here, the receiving tree, which stays and receives the host's
//! later mounts. [`StagingDir::sync`] repeats them in the share. So no host-only file system gets into the share, and
//! the host can unmount a file system on which a guest has open files.

use std::{
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, umount2},
};

use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_tree::{Submount, Tree, differences};
use crate::volumes::{mount_api, mountinfo, unmount};

/// Subdirectory of the receiving trees. Each has the name of its volume in the share.
const RECEIVING: &str = "receiving";
/// Subdirectory of the trees that are being copied.
const COPYING: &str = "copying";

/// The staging directory of a sandbox.
pub struct StagingDir {
    dir: PathBuf,
}

/// Error of updating the share's mounts.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {}", path.display())]
pub struct SyncError {
    step: &'static str,
    /// The mount point in the share.
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl StagingDir {
    /// Returns the staging directory of the sandbox with this share. It is beside the share.
    pub fn for_share(share: &Path) -> Self {
        Self { dir: share.with_file_name("stage") }
    }

    /// Returns the path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the rule for host-only file systems of this sandbox.
    ///
    /// # Errors
    /// As [`HostOnly::new`].
    pub fn host_only(&self, share: &Path) -> Result<HostOnly, SyncError> {
        let step = "find host-only file systems for";
        HostOnly::new([share, &self.dir]).map_err(|source| SyncError { step, path: share.to_owned(), source })
    }

    /// Creates the subdirectories. The directory itself must be mounted before (see [`crate::volumes::Share`]).
    ///
    /// # Errors
    /// The error of mkdir(2).
    pub fn create(&self) -> io::Result<()> {
        [RECEIVING, COPYING].iter().try_for_each(|name| fs::create_dir(self.dir.join(name)))
    }

    /// Returns a detached, private copy of the detached mount tree `tree`, without host-only file systems. Returns also
    /// the mount points of these, relative to the tree, with their type.
    ///
    /// No two concurrent copies may have the same `name`.
    ///
    /// # Errors
    /// If a mount cannot be copied. Everything is removed from the staging directory in this case.
    pub fn copy(
        &self,
        tree: &OwnedFd,
        host_only: &HostOnly,
        name: impl AsRef<OsStr>,
    ) -> io::Result<(OwnedFd, Vec<String>)> {
        let dir = self.dir.join(COPYING).join(name.as_ref());
        let (from, to) = (dir.join("from"), dir.join("to"));
        let copied = copy_in(tree, host_only, &dir, (&from, &to));
        let points = [&to, &from];
        let removed = points.iter().map(|point| unmount::unmount(point).and_then(|()| unmount::remove(point)));
        let removed = first_error(removed).and(unmount::remove(&dir));
        let copied = copied?;
        removed.map(|()| copied)
    }

    /// Attaches `tree`, a slave of the host's mounts, as the receiving tree of volume `name`.
    /// [`StagingDir::remove_receiving`] must follow.
    ///
    /// # Errors
    /// If the tree cannot be attached. Its mount point is removed in this case.
    pub fn add_receiving(&self, tree: &OwnedFd, host_only: &HostOnly, directory: bool, name: &str) -> io::Result<()> {
        let point = self.dir.join(RECEIVING).join(name);
        if directory {
            fs::create_dir(&point)?;
        } else {
            fs::File::create_new(&point)?;
        }
        let attached = mount_api::open_path(&point, false).and_then(|to| mount_api::attach(tree.as_fd(), to.as_fd()));
        if let Err(error) = attached {
            // Best effort: the first error is reported.
            let _ = unmount::remove(&point);
            return Err(error);
        }
        // Best effort: `sync` excludes host-only mounts that stay. Copies of the share and of the staging directory are
        // detached here, because otherwise every later volume would propagate into each receiving tree.
        if let (Ok(entries), Ok(Some(base))) = (mountinfo::read(), mounted(&point))
            && let Some(tree) = Tree::of(&entries, base.id)
        {
            for host_only in tree.reachable(|entry| host_only.contains(entry)).1 {
                let _ = detach(&base.file, &host_only);
            }
        }
        Ok(())
    }

    /// Returns whether volume `name` has a receiving tree.
    pub fn has_receiving(&self, name: &str) -> bool {
        self.dir.join(RECEIVING).join(name).exists()
    }

    /// Removes the receiving tree of volume `name`, if there is one.
    ///
    /// # Errors
    /// The error of umount2(2), unlink(2) or rmdir(2).
    pub fn remove_receiving(&self, name: &OsStr) -> io::Result<()> {
        let point = self.dir.join(RECEIVING).join(name);
        unmount::unmount(&point)?;
        unmount::remove(&point)
    }

    /// Repeats in `volumes`, the share's directory of volumes, the mounts and unmounts in the receiving trees.
    ///
    /// Calls must not overlap. Volumes may be added and removed at the same time. No request is sent to a file system,
    /// so a file system that hangs blocks this only if a mount point lies in it.
    ///
    /// # Errors
    /// The first error. The other volumes are updated nevertheless.
    pub fn sync(&self, volumes: &Path, host_only: &HostOnly) -> Result<(), SyncError> {
        let (entries, names) = mountinfo::read()
            .and_then(|entries| Ok((entries, list(&self.dir.join(RECEIVING))?)))
            .map_err(|source| SyncError { step: "list the mounts of", path: self.dir.clone(), source })?;
        let results = names.iter().map(|name| {
            let target = volumes.join(name);
            sync_volume(&entries, host_only, &self.dir.join(RECEIVING).join(name), &target)
        });
        first_error(results)
    }
}

fn list(dir: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
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
        // A mount that no path reaches does not fail the volume. Its mount point may be in a file system whose server has
        // died, or a guest may have moved it below a path that is too long.
        if let Err(error) = copy_staged(&from.file, to, submount) {
            unreachable.push(&submount.path);
            if error.kind() != io::ErrorKind::NotFound {
                left_out.push(describe(&submount.path, &error.to_string()));
            }
        }
    }
    Ok((mount_api::clone_tree(mount_api::open_path(to, false)?.as_fd(), true)?, left_out))
}

fn sync_volume(
    entries: &[mountinfo::Entry],
    host_only: &HostOnly,
    point: &Path,
    target: &Path,
) -> Result<(), SyncError> {
    let error = |step, path: &Path| {
        let path = target.join(path);
        move |source| SyncError { step, path, source }
    };
    let bases = mounted(point).and_then(|from| Ok((from, mounted(target)?)));
    // A volume that is being added or removed has only one of the two.
    let (Some(from), Some(to)) = bases.map_err(error("open", Path::new("")))? else { return Ok(()) };
    let (Some(received), Some(shared)) = (Tree::of(entries, from.id), Tree::of(entries, to.id)) else { return Ok(()) };
    let (received, _) = received.reachable(|entry| host_only.contains(entry));
    let (shared, _) = shared.reachable(|_| false);
    let (removed, added) = differences(shared, received);
    // Only the topmost: the unmount takes along what is below, and a path below may lie in a file system that hangs.
    let unmounted = removed.iter().map(|submount| detach(&to.file, submount).map_err(error("unmount", &submount.path)));
    let unmounted = first_error(unmounted);
    let mounted = copy_new(&from.file, target, &added, host_only);
    unmounted.and(mounted.map_err(|(path, source)| error("mount", &path)(source)))
}

/// Copies new mounts, parents first. Returns the first error with its path.
fn copy_new(
    from: &OwnedFd,
    to: &Path,
    added: &[Submount<'_>],
    host_only: &HostOnly,
) -> Result<(), (PathBuf, io::Error)> {
    if added.is_empty() {
        return Ok(());
    }
    let opened: Vec<_> = added.iter().map(|submount| (submount, open_below(from, &submount.path))).collect();
    // The kernel reuses the ids of mounts that are gone, so an id in an older list may mean another mount by now. The fds
    // keep the ids from being reused: only this list is judged.
    let entries = mountinfo::read().map_err(|error| (PathBuf::new(), error))?;
    let results = opened.into_iter().map(|(submount, source)| {
        let copied = source.and_then(|source| {
            let id = mount_api::mount_id(source.as_fd())?;
            match entries.iter().find(|entry| entry.id == id) {
                Some(entry) if !host_only.contains(entry) => attach_copy(&source, to, &submount.path),
                // Unmounted, or replaced by a host-only mount. The next update sees that.
                _ => Ok(()),
            }
        });
        copied.map_err(|error| (submount.path.clone(), error))
    });
    first_error(results)
}

/// The topmost mount on a mount point.
struct Mounted {
    file: OwnedFd,
    id: u64,
}

/// Opens the topmost mount at `point`; `None` if nothing is mounted there, or `point` does not exist.
fn mounted(point: &Path) -> io::Result<Option<Mounted>> {
    let file = match mount_api::open_path(point, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let parent = mount_api::open_path(point.parent().ok_or(io::ErrorKind::InvalidInput)?, false)?;
    let (id, below) = (mount_api::mount_id(file.as_fd())?, mount_api::mount_id(parent.as_fd())?);
    Ok((id != below).then_some(Mounted { file, id }))
}

/// Runs all steps and returns the first error.
fn first_error<E>(steps: impl Iterator<Item = Result<(), E>>) -> Result<(), E> {
    let errors: Vec<E> = steps.filter_map(Result::err).collect();
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Copies one mount of a staged tree. The tree is private, so its mounts are those of the list.
fn copy_staged(from: &OwnedFd, to: &Path, submount: &Submount<'_>) -> io::Result<()> {
    let source = open_below(from, &submount.path)?;
    if mount_api::mount_id(source.as_fd())? != submount.entry.id {
        return Err(io::ErrorKind::NotFound.into());
    }
    attach_copy(&source, to, &submount.path)
}

/// Attaches a private copy of the mount `source`, without its submounts, at `path` below the mount at `to`.
///
/// Does nothing if nothing is mounted at `to` any more.
fn attach_copy(source: &OwnedFd, to: &Path, path: &Path) -> io::Result<()> {
    // Opened for every submount, because an earlier one may cover `to`. The fd of the mount ensures that nothing is
    // attached to the mount point below it if the volume is removed at the same time.
    let Some(to) = mounted(to)? else { return Ok(()) };
    let tree = mount_api::clone_tree(source.as_fd(), false)?;
    mount_api::set_attributes(tree.as_fd(), 0, libc::MS_PRIVATE, false)?;
    mount_api::attach(tree.as_fd(), open_below(&to.file, path)?.as_fd())
}

/// Unmounts a mount below `base`, with its submounts.
fn detach(base: &OwnedFd, submount: &Submount<'_>) -> io::Result<()> {
    let file = match open_below(base, &submount.path) {
        // The mount disappeared together with its mount point.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if mount_api::mount_id(file.as_fd())? != submount.entry.id {
        return Err(io::Error::other("another mount has replaced it"));
    }
    // By the fd: a guest may put a symlink into the path at any time.
    match umount2(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(), MntFlags::MNT_DETACH) {
        // It was unmounted together with its volume.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens `path` below `base` without following symlinks, because a guest may write to the directories in between.
fn open_below(base: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    if path.as_os_str().is_empty() {
        return base.try_clone();
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(base, path, how)?)
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::volumes::mountinfo::Entry;
    use crate::volumes::test_support::{isolated, tmpfs};

    /// Returns the id of the mount at `point`.
    fn id(point: &Path) -> u64 {
        mounted(point).unwrap().unwrap().id
    }

    #[test]
    fn symlinks_of_a_guest_are_not_followed() {
        isolated(|dir| {
            let at = |path: &str| dir.join(path);
            for path in ["from", "to", "outside", "from/a/b", "to/real", "outside/b"] {
                tmpfs(&at(path));
            }
            fs::write(at("outside/b/file"), "").unwrap();
            // Replaces the directory `a` of the mount list.
            std::os::unix::fs::symlink(at("outside"), at("to/a")).unwrap();
            let entries = mountinfo::read().unwrap();
            let entry = |id: u64| -> &Entry { entries.iter().find(|entry| entry.id == id).unwrap() };
            let (from, to) = (mount_api::open_path(&at("from"), false).unwrap(), at("to"));
            let submount = Submount { path: "a/b".into(), entry: entry(id(&at("from/a/b"))) };
            let before = mountinfo::read().unwrap().len();
            assert_eq!(copy_staged(&from, &to, &submount).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            let outside = Submount { path: "a/b".into(), entry: entry(id(&at("outside/b"))) };
            let to = mount_api::open_path(&to, false).unwrap();
            assert_eq!(detach(&to, &outside).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            assert_eq!(mountinfo::read().unwrap().len(), before);
            assert!(at("outside/b/file").exists());
            // A mount that is not the one in the list is not unmounted.
            let other = Submount { path: "real".into(), entry: entry(id(&at("outside/b"))) };
            assert!(detach(&to, &other).is_err());
            assert_eq!(mountinfo::read().unwrap().len(), before);
        });
    }

    #[test]
    fn a_host_only_mount_with_a_reused_id_is_not_copied() {
        isolated(|dir| {
            let at = |path: &str| dir.join(path);
            for path in ["from", "to"] {
                tmpfs(&at(path));
                fs::create_dir(at(path).join("a")).unwrap();
            }
            tmpfs(&at("from/a"));
            let entries = mountinfo::read().unwrap();
            let old = id(&at("from/a"));
            let added = [Submount { path: "a".into(), entry: entries.iter().find(|entry| entry.id == old).unwrap() }];
            // The list is outdated, and the kernel gives the lowest free id to the new mount.
            nix::mount::umount(&at("from/a")).unwrap();
            mount(Some("proc"), &at("from/a"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
            let from = mount_api::open_path(&at("from"), false).unwrap();
            copy_new(&from, &at("to"), &added, &HostOnly::new([]).unwrap()).unwrap();
            assert!(mounted(&at("to/a")).unwrap().is_none());
        });
    }
}
