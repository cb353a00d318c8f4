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
    for (point, recursive) in points(needed)? {
        let tree = copy_of(&point, recursive)?;
        let relative = point.strip_prefix("/").unwrap_or(&point);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let target = openat(&copy, relative, flags, Mode::empty()).map_err(error("open the copy of", &point))?;
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

/// Returns the mount points that the namespace contains, except `/`, and whether their submounts are included. Mount
/// points come before the mount points below them.
fn points(needed: &[PathBuf]) -> Result<Vec<(PathBuf, bool)>, MountNamespaceError> {
    let trees = TREES.map(Path::new);
    let mut directories = BTreeSet::new();
    for path in trees.into_iter().map(ToOwned::to_owned).chain(needed.iter().filter_map(|path| resolve(path))) {
        directories.extend(path.ancestors().map(Path::to_owned));
    }
    let mut ids: BTreeMap<&Path, u64> = BTreeMap::new();
    let mut points = Vec::new();
    for directory in &directories {
        if trees.iter().any(|tree| directory != tree && directory.starts_with(tree)) {
            continue;
        }
        let id =
            open_path(directory, false).and_then(|file| mount_id(file.as_fd())).map_err(error("open", directory))?;
        let is_mount_point = directory.parent().is_some_and(|parent| ids.get(parent) != Some(&id));
        if is_mount_point {
            points.push((directory.clone(), trees.contains(&directory.as_path())));
        }
        ids.insert(directory, id);
    }
    Ok(points)
}

/// Returns `path` without symlinks, or the deepest directory above `path` that exists.
fn resolve(path: &Path) -> Option<PathBuf> {
    path.is_absolute().then(|| path.ancestors().find_map(|path| path.canonicalize().ok())).flatten()
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
