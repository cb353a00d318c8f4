//! Copies and unmounts single submounts. Does not follow symlinks, because a guest may have created them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, umount2},
};

use crate::volumes::mount_api;
use crate::volumes::mount_tree::Submount;

/// The topmost mount on a mount point.
pub struct Mounted {
    /// The root of the mount, opened with O_PATH.
    pub file: OwnedFd,
    /// Mount id.
    pub id: u64,
}

/// Opens the topmost mount at `point`. Returns `None` if `point` is not a mount point, or does not exist.
pub fn mounted(point: &Path) -> io::Result<Option<Mounted>> {
    let file = match mount_api::open_path(point, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let parent = mount_api::open_path(point.parent().ok_or(io::ErrorKind::InvalidInput)?, false)?;
    let (id, below) = (mount_api::mount_id(file.as_fd())?, mount_api::mount_id(parent.as_fd())?);
    Ok((id != below).then_some(Mounted { file, id }))
}

/// Runs all steps and returns the first error.
pub fn first_error<E>(steps: impl Iterator<Item = Result<(), E>>) -> Result<(), E> {
    let errors: Vec<E> = steps.filter_map(Result::err).collect();
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Copies `submount` from the tree at `from` to the same path below `to`.
///
/// The tree at `from` is in the staging directory and is private. Therefore, no mount has propagated into this tree
/// since the caller read the mount list.
pub fn copy_staged(from: &OwnedFd, to: &Path, submount: &Submount<'_>) -> io::Result<()> {
    let source = open_below(from, &submount.path)?;
    // If a guest renamed a directory of the path, the path may lead to a different mount.
    if mount_api::mount_id(source.as_fd())? != submount.entry.id {
        return Err(io::ErrorKind::NotFound.into());
    }
    attach_copy(&source, to, &submount.path)
}

/// Attaches a private copy of the mount `source`, without its submounts, at `path` below the mount at `to`.
///
/// Does nothing if `to` is not a mount point.
pub fn attach_copy(source: &OwnedFd, to: &Path, path: &Path) -> io::Result<()> {
    // Open `to` for each submount, because a submount may cover `to`. The fd refers to the mount, not to the mount
    // point. Therefore, nothing is attached to the mount point if another thread removes the volume.
    let Some(to) = mounted(to)? else { return Ok(()) };
    let tree = mount_api::clone_tree(source.as_fd(), false)?;
    mount_api::set_attributes(tree.as_fd(), 0, libc::MS_PRIVATE, false)?;
    mount_api::attach_to_share(tree.as_fd(), open_below(&to.file, path)?.as_fd())
}

/// Unmounts `submount` and all mounts below `submount`. `base` is the root of the mount tree.
pub fn detach(base: &OwnedFd, submount: &Submount<'_>) -> io::Result<()> {
    let file = match open_below(base, &submount.path) {
        // The mount disappeared together with its mount point.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if mount_api::mount_id(file.as_fd())? != submount.entry.id {
        return Err(io::Error::other("another mount has replaced the mount"));
    }
    // Unmount by the fd, because a guest may put a symlink into the path at any time.
    match umount2(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(), MntFlags::MNT_DETACH) {
        // EINVAL means that the mount was unmounted together with its volume.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens `path` below `base`. Does not follow symlinks, because a guest may write to the directories in `path`.
pub fn open_below(base: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
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
    use std::fs;

    use super::*;
    use crate::volumes::mountinfo;
    use crate::volumes::mountinfo::Entry;
    use crate::volumes::test_support::{isolated, tmpfs};

    /// Returns the id of the mount at `point`.
    fn id(point: &Path) -> u64 {
        mounted(point).unwrap().unwrap().id
    }

    #[test]
    fn copy_and_detach_do_not_follow_symlinks() {
        isolated(|dir| {
            let at = |path: &str| dir.join(path);
            for path in ["from", "to", "outside", "from/a/b", "to/real", "outside/b"] {
                tmpfs(&at(path));
            }
            fs::write(at("outside/b/file"), "").unwrap();
            // In `to`, the component `a` of the path `a/b` is a symlink.
            std::os::unix::fs::symlink(at("outside"), at("to/a")).unwrap();
            let entries = mountinfo::read().unwrap();
            let entry = |id: u64| -> &Entry { entries.iter().find(|entry| entry.id == id).unwrap() };
            let (from, to) = (mount_api::open_path(&at("from"), false).unwrap(), at("to"));
            let submount = Submount { path: "a/b".into(), entry: entry(id(&at("from/a/b"))), is_cover: false };
            let before = mountinfo::read().unwrap().len();
            assert_eq!(copy_staged(&from, &to, &submount).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            let outside = Submount { path: "a/b".into(), entry: entry(id(&at("outside/b"))), is_cover: false };
            let to = mount_api::open_path(&to, false).unwrap();
            assert_eq!(detach(&to, &outside).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            assert_eq!(mountinfo::read().unwrap().len(), before);
            assert!(at("outside/b/file").exists());
            // A mount whose id differs from the id in the list is not unmounted.
            let other = Submount { path: "real".into(), entry: entry(id(&at("outside/b"))), is_cover: false };
            assert!(detach(&to, &other).is_err());
            assert_eq!(mountinfo::read().unwrap().len(), before);
        });
    }
}
