//! Trees of the host's mounts for the guest: copies without the file systems that are the host's alone.
//!
//! A tree is staged in a directory that the guest has no view of, because only an attached mount can be unmounted. What
//! the guest may have of it is then copied to the share. Staged trees are private, so nothing is mounted in them between.
//!
//! A volume with `rslave` propagation has a second staged tree, which stays and receives what the host mounts later.
//! [`Stage::sync`] makes the same changes in the share, mount by mount. So no host-only file system gets there, and the
//! host can unmount what a guest has open files of.

use super::{
    binds,
    host_only::HostOnly,
    mountinfo::{self, Entry},
    syscall,
};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, umount2},
};
use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Maximum number of mounts stacked on one mount point. It bounds the loop of [`Stage::prune`].
const MOST_STACKED: usize = 64;

/// Where a sandbox's trees are staged.
pub struct Stage {
    dir: PathBuf,
    host_only: HostOnly,
}

impl Stage {
    /// The stage of the sandbox with this share: a directory beside it.
    pub fn of(share: &Path) -> Self {
        let dir = share.with_file_name("stage");
        // Otherwise a volume of `/` would give a container write access to the share itself.
        let host_only = HostOnly::now().and([share, &dir], "the sandbox's share");
        Self { dir, host_only }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The rule that tells host-only file systems.
    pub fn host_only(&self) -> &HostOnly {
        &self.host_only
    }

    /// What the guest may have of `tree`, a detached private copy of the host's mounts; with the mount points that were
    /// left out, relative to the tree. It is staged as `name` meanwhile.
    ///
    /// # Errors
    /// When a mount cannot be made, or a host-only one not be unmounted.
    pub fn copy(&self, tree: &OwnedFd, name: &str) -> io::Result<(OwnedFd, Vec<String>)> {
        let copied = self.keep(tree, true, name).and_then(|left_out| {
            let copy = syscall::clone_tree(syscall::open_path(&self.dir.join(name), false)?.as_fd(), true)?;
            Ok((copy, left_out))
        });
        self.remove(name)?;
        copied
    }

    /// Stages `tree` as `name` until [`Stage::remove`]; gives the mount points that were left out.
    ///
    /// # Errors
    /// As [`Stage::copy`]; something may be staged then.
    pub fn keep(&self, tree: &OwnedFd, directory: bool, name: &str) -> io::Result<Vec<String>> {
        let point = self.dir.join(name);
        if directory {
            fs::create_dir(&point)?;
        } else {
            fs::File::create_new(&point)?;
        }
        syscall::attach(tree.as_fd(), syscall::open_path(&point, false)?.as_fd())?;
        self.prune(&point)
    }

    /// Whether a tree of this name is staged.
    pub fn has(&self, name: &str) -> bool {
        self.dir.join(name).exists()
    }

    /// Takes a staged tree away; any number of times.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let point = self.dir.join(name);
        binds::unmount(&point)?;
        binds::remove(&point)
    }

    /// Updates the mounts in `volumes` to those of the staged trees. A tree and its volume have the same name. Goes on after
    /// a failure.
    ///
    /// # Errors
    /// The first failure.
    pub fn sync(&self, volumes: &Path) -> io::Result<()> {
        let names: Vec<_> = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        let results = names.iter().map(|name| self.sync_tree(&self.dir.join(name), &volumes.join(name)));
        first_error(results)
    }

    fn sync_tree(&self, point: &Path, target: &Path) -> io::Result<()> {
        self.prune(point)?;
        let entries = mountinfo::read()?;
        let (staged, shared) = (Tree::of(&entries, point), Tree::of(&entries, target));
        // A host-only mount may have come since.
        let allowed = staged.mounts().filter(|(_, entry)| !self.host_only.has(entry));
        let (mut gone, mut new) = differences(shared.mounts().collect(), allowed.collect());
        gone.sort_by_key(|(path, _)| std::cmp::Reverse(path.components().count()));
        new.sort_by_key(|(path, _)| path.components().count());
        let gone = gone.into_iter().map(|(path, entry)| detach(target, &path, entry.id));
        let new = new.into_iter().map(|(path, entry)| self.copy_one(point, target, &path, entry.id));
        first_error(gone.chain(new))
    }

    /// Copies one mount, without what is mounted below it.
    fn copy_one(&self, point: &Path, target: &Path, path: &Path, id: u64) -> io::Result<()> {
        let source = open_below(point, path)?;
        // Another may cover it, which is copied in its place. The list and the mount are not of one moment: what counts
        // is what was opened.
        if syscall::mount_id(source.as_fd())? != id || self.host_only.type_of(&source)?.is_some() {
            return Ok(());
        }
        let tree = syscall::clone_tree(source.as_fd(), false)?;
        syscall::set_attr(tree.as_fd(), 0, libc::MS_PRIVATE, false)?;
        syscall::attach(tree.as_fd(), open_below(target, path)?.as_fd())
    }

    /// Unmounts every host-only mount below `point`, with what is mounted below and over it; gives their places.
    fn prune(&self, point: &Path) -> io::Result<Vec<String>> {
        let (mut left_out, mut failure) = (Vec::new(), None);
        for _ in 0..MOST_STACKED {
            let entries = mountinfo::read()?;
            let tree = Tree::of(&entries, point);
            let base = tree.base()?;
            if self.host_only.has(base) {
                return Err(io::Error::other(format!("it is on a file system that is the node's own ({})", base.kind)));
            }
            let mut out: Vec<Placed<'_>> = tree.mounts().filter(|(_, entry)| self.host_only.has(entry)).collect();
            if out.is_empty() {
                return Ok(left_out);
            }
            // A parent takes with it what is mounted below.
            out.sort_by_key(|(path, _)| path.components().count());
            let mut gone: Vec<&Path> = Vec::new();
            for (path, entry) in &out {
                if !gone.iter().any(|gone| path.starts_with(gone)) {
                    // A mount over it has to go first.
                    let top = tree.mounts().filter(|(other, _)| other == path).last();
                    match detach(point, path, top.map_or(entry.id, |(_, top)| top.id)) {
                        Ok(()) => left_out.push(format!("{} ({})", Path::new("/").join(path).display(), entry.kind)),
                        // Something has changed since the list was read, so it is read again.
                        Err(error) => failure = Some(error),
                    }
                    gone.push(path);
                }
            }
        }
        let stacked =
            "failed to unmount the node's own file systems: too many are stacked, or more are mounted meanwhile";
        Err(failure.unwrap_or_else(|| io::Error::other(stacked)))
    }
}

/// Runs all steps; gives the first error.
fn first_error(steps: impl Iterator<Item = io::Result<()>>) -> io::Result<()> {
    let errors: Vec<io::Error> = steps.filter_map(Result::err).collect();
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Unmounts the mount with this id, which is the last one made at `path` below `point`.
fn detach(point: &Path, path: &Path, id: u64) -> io::Result<()> {
    let file = open_below(point, path)?;
    if syscall::mount_id(file.as_fd())? != id {
        return Err(io::Error::other(format!("another mount is at {} by now", path.display())));
    }
    // Not by its path, in which a guest may put a link meanwhile.
    Ok(umount2(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(), MntFlags::MNT_DETACH)?)
}

/// Opens `path` below `point`. A guest may write to the directories in between: no link is followed.
fn open_below(point: &Path, path: &Path) -> io::Result<OwnedFd> {
    let base = syscall::open_path(point, false)?;
    if path.as_os_str().is_empty() {
        return Ok(base);
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(&base, path, how)?)
}

/// The mounts at and below a mount point.
struct Tree<'a> {
    point: PathBuf,
    entries: Vec<&'a Entry>,
}

impl<'a> Tree<'a> {
    fn of(entries: &'a [Entry], point: &Path) -> Self {
        Self { point: point.to_owned(), entries: mountinfo::below(entries, point) }
    }

    fn is_base(&self, entry: &Entry) -> bool {
        entry.point == self.point && !self.entries.iter().any(|other| other.id == entry.parent)
    }

    /// The one that is mounted there first.
    fn base(&self) -> io::Result<&'a Entry> {
        let base = self.entries.iter().copied().find(|entry| self.is_base(entry));
        base.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "nothing is mounted there"))
    }

    /// The others, each with its place relative to the point.
    fn mounts(&self) -> impl Iterator<Item = (PathBuf, &'a Entry)> {
        let others = self.entries.iter().copied().filter(|entry| !self.is_base(entry));
        others.filter_map(|entry| Some((entry.point.strip_prefix(&self.point).ok()?.to_owned(), entry)))
    }
}

type Placed<'a> = (PathBuf, &'a Entry);

/// What is in `left` alone, and what is in `right` alone: the same directory of one file system at the same place is one.
fn differences<'a>(left: Vec<Placed<'a>>, mut right: Vec<Placed<'a>>) -> (Vec<Placed<'a>>, Vec<Placed<'a>>) {
    let mut alone = Vec::new();
    for (path, entry) in left {
        let same =
            |(other, found): &Placed<'_>| (other, found.device, &found.root) == (&path, entry.device, &entry.root);
        match right.iter().position(same) {
            Some(at) => drop(right.remove(at)),
            None => alone.push((path, entry)),
        }
    }
    (alone, right)
}
