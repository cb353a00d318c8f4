//! Creates the daemon's mount namespace, which contains only what the daemon needs.
//!
//! A node has mounts for each pod: network namespaces, shared memory, volumes. If each shim's namespace contained all
//! of these mounts, their number would grow with the square of the number of pods. Each mount(2) on the node would
//! change all of these namespaces. Therefore, the namespace has private copies of a few mounts. The host's later mounts
//! and unmounts do not propagate to the namespace. Everything else is opened in the host's namespace
//! ([`crate::host_view`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_base::sys::mount::{attach, clone_tree, mount_id};
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};

use crate::volumes::mount_api::open_path;

/// Directories that the namespace contains with all their submounts. The number of these mounts does not depend on the
/// pods of the node.
const TREES: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Maximum number of symlinks that a lookup follows, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A failure to create the mount namespace.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {}", path.display())]
pub struct MountNamespaceError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn error<E: Into<io::Error>>(step: &'static str, path: &Path) -> impl FnOnce(E) -> MountNamespaceError {
    let path = path.to_owned();
    move |source| MountNamespaceError { step, path, source: source.into() }
}

/// Moves this thread to a new mount namespace. The namespace contains the mounts that a lookup of the paths in `needed`
/// passes, and [`TREES`]. Paths that do not exist are ignored. The working directory is `/` afterwards.
///
/// The kernel removes the pod's mounts when the last process in the namespace ends.
///
/// # Errors
/// [`MountNamespaceError`]. The thread may then be in the new namespace, with any of the host's mounts.
pub fn enter(needed: &[PathBuf]) -> Result<(), MountNamespaceError> {
    let (root, none) = (Path::new("/"), None::<&Path>);
    unshare(CloneFlags::CLONE_NEWNS).map_err(error("create a mount namespace with a copy of", root))?;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)
        .map_err(error("set private propagation of", root))?;
    let copy = copy_of(root, false)?;
    // The copy covers the old root. The kernel attaches mounts only to mounts that are attached themselves.
    let target = open_path(root, false).map_err(error("open", root))?;
    attach(copy.as_fd(), target.as_fd()).map_err(error("attach a copy of", root))?;
    drop(target);
    for (point, recursive) in points(&directories(needed))? {
        // A mount point can disappear, for example when another pod ends.
        let Some(tree) = if_exists(copy_of(&point, recursive))? else { continue };
        let relative = point.strip_prefix("/").unwrap_or(&point);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let target = openat(&copy, relative, flags, Mode::empty()).map_err(error("open the copy of", &point));
        let Some(target) = if_exists(target)? else { continue };
        attach(tree.as_fd(), target.as_fd()).map_err(error("attach a copy of", &point))?;
    }
    // pivot_root stacks the old root on the new root. One umount2 then removes the copies of all of the host's mounts
    // (pivot_root(2), NOTES). An umount2 for each mount would take long, because each waits for an RCU grace period.
    fchdir(&copy).map_err(error("enter the copy of", root))?;
    pivot_root(".", ".").map_err(error("change the root to the copy of", root))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(error("unmount the host's", root))?;
    chdir("/").map_err(error("enter", root))
}

fn copy_of(point: &Path, recursive: bool) -> Result<OwnedFd, MountNamespaceError> {
    let original = open_path(point, false).map_err(error("open", point))?;
    clone_tree(original.as_fd(), recursive).map_err(error("copy the mount of", point))
}

/// Returns `None` if the file does not exist. The trees must exist.
fn if_exists<T>(result: Result<T, MountNamespaceError>) -> Result<Option<T>, MountNamespaceError> {
    match result {
        Err(MountNamespaceError { path, source, .. })
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                && !TREES.iter().any(|tree| path == Path::new(tree)) =>
        {
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// Returns the mount points in `directories` that the namespace contains, except `/`, and whether their submounts are
/// included. Mount points come before the mount points below them. Directories that have disappeared are skipped.
fn points(directories: &BTreeSet<PathBuf>) -> Result<Vec<(PathBuf, bool)>, MountNamespaceError> {
    let trees = TREES.map(Path::new);
    let mut ids: BTreeMap<&Path, u64> = BTreeMap::new();
    let mut points = Vec::new();
    for directory in directories {
        if trees.iter().any(|tree| directory != tree && directory.starts_with(tree)) {
            continue;
        }
        let id = open_path(directory, false).and_then(|file| mount_id(file.as_fd()));
        let Some(id) = if_exists(id.map_err(error("open", directory)))? else { continue };
        let is_mount_point = directory.parent().is_some_and(|parent| ids.get(parent) != Some(&id));
        if is_mount_point {
            points.push((directory.clone(), trees.contains(&directory.as_path())));
        }
        ids.insert(directory, id);
    }
    Ok(points)
}

/// Returns the directories that a lookup of the paths in `needed` passes, and [`TREES`] with the directories above
/// them. No path in the result contains a symlink.
fn directories(needed: &[PathBuf]) -> BTreeSet<PathBuf> {
    let trees = TREES.map(Path::new);
    let mut passed: BTreeSet<_> = trees.iter().flat_map(|tree| tree.ancestors()).map(Path::to_owned).collect();
    needed.iter().filter(|path| path.is_absolute()).for_each(|path| add_passed(path, &mut passed));
    passed
}

/// Adds the files and directories that a lookup of `path` passes, until the first one that does not exist. A symlink
/// may be in another mount than its target. Therefore, the lookup passes the directories above each symlink, too.
fn add_passed(path: &Path, passed: &mut BTreeSet<PathBuf>) {
    let components = |path: &Path| path.components().map(|part| part.as_os_str().to_owned()).rev().collect::<Vec<_>>();
    // The names that the lookup has not passed. The last one is next.
    let (mut here, mut rest, mut links) = (PathBuf::from("/"), components(path), 0);
    while let Some(name) = rest.pop() {
        if name == ".." {
            here.pop();
            continue;
        }
        // The name `/` of an absolute path replaces the path.
        let next = here.join(name);
        match next.read_link() {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                rest.extend(components(&target));
            }
            // EINVAL: not a symlink.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                passed.insert(next.clone());
                here = next;
            }
            Ok(_) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::volumes::mountinfo;
    use crate::volumes::test_support::{isolated, shared_mount, tmpfs};

    fn in_daemon<T: Send>(needed: &[PathBuf], test: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let daemon = scope.spawn(|| {
                enter(needed).unwrap();
                test()
            });
            daemon.join().unwrap()
        })
    }

    #[test]
    fn namespace_contains_only_needed_mounts() {
        isolated(|dir| {
            let needed = [dir.join("state/pod/share"), "/nowhere/x".into()];
            tmpfs(&dir.join("state"));
            tmpfs(&dir.join("state/pod"));
            fs::write(dir.join("state/pod/file"), "").unwrap();
            let count = || in_daemon(&needed, || mountinfo::read().unwrap().len());
            let before = count();
            for number in 0..50 {
                tmpfs(&dir.join(format!("state/other-{number}")));
            }
            assert_eq!(count(), before);
            in_daemon(&needed, || {
                assert!(dir.join("state/pod/file").exists() && dir.join("state/other-1").exists());
                assert_eq!(std::env::current_dir().unwrap(), Path::new("/"));
                assert!(Path::new("/proc/self/status").exists() && Path::new("/dev/null").exists());
                let mounts = mountinfo::read().unwrap();
                let below: Vec<_> = mounts.iter().filter(|mount| mount.point.starts_with(dir)).collect();
                assert_eq!(below.len(), 2, "{below:?}");
                assert!(mounts.iter().any(|mount| mount.point == Path::new("/sys")));
            });
        });
    }

    #[test]
    fn namespace_contains_the_mounts_of_symlinks_on_the_way() {
        isolated(|dir| {
            use std::os::unix::fs::symlink;
            for name in ["first", "second", "files", "unrelated"] {
                tmpfs(&dir.join(name));
            }
            fs::write(dir.join("files/file"), "").unwrap();
            symlink(dir.join("second/link"), dir.join("first/link")).unwrap();
            symlink("../files/new/../.", dir.join("second/link")).unwrap();
            fs::create_dir(dir.join("files/new")).unwrap();
            symlink("loop", dir.join("unrelated/loop")).unwrap();
            let needed = [dir.join("first/link/file"), dir.join("first/link/gone/x"), dir.join("unrelated/loop/x")];
            in_daemon(&needed, || {
                assert!(needed[0].exists());
                let mounts = mountinfo::read().unwrap();
                assert_eq!(mounts.iter().filter(|mount| mount.point.starts_with(dir)).count(), 4);
            });
        });
    }

    #[test]
    fn directories_that_disappear_are_skipped() {
        isolated(|dir| {
            tmpfs(&dir.join("state"));
            let needed = [dir.join("state"), dir.join("state/gone/x")];
            let mut directories = directories(&needed);
            directories.extend(dir.join("state/gone/x").ancestors().map(Path::to_owned));
            directories.insert(dir.join("gone"));
            let points = points(&directories).unwrap();
            assert_eq!(points.iter().filter(|(point, _)| point.starts_with(dir)).count(), 1);
            assert!(if_exists(copy_of(&dir.join("gone"), false)).unwrap().is_none());
            assert!(points.contains(&(PathBuf::from("/proc"), true)));
        });
    }

    #[test]
    fn later_mounts_of_the_host_are_not_copied_and_can_be_unmounted() {
        isolated(|dir| {
            let root = shared_mount(dir);
            fs::create_dir(root.join("later")).unwrap();
            tmpfs(&root.join("early"));
            let (to_host, at_host) = std::sync::mpsc::channel();
            let (to_daemon, at_daemon) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                let root = &root;
                scope.spawn(move || {
                    enter(std::slice::from_ref(root)).unwrap();
                    let count = mountinfo::read().unwrap().len();
                    to_host.send(()).unwrap();
                    at_daemon.recv().unwrap();
                    assert_eq!(mountinfo::read().unwrap().len(), count);
                    assert!(!root.join("later/file").exists());
                });
                at_host.recv().unwrap();
                tmpfs(&root.join("later"));
                fs::write(root.join("later/file"), "").unwrap();
                nix::mount::umount(&root.join("early")).unwrap();
                to_daemon.send(()).unwrap();
            });
            nix::mount::umount(&root.join("later")).unwrap();
        });
    }
}
