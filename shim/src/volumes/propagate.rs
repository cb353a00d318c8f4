//! Updates the share after the host mounts or unmounts something in a volume with `rslave` propagation.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use crate::volumes::covers::{self, Covers};
use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_tree::{Submount, Tree, differences};
use crate::volumes::shared_mounts::VOLUMES;
use crate::volumes::staging_dir::StagingDir;
use crate::volumes::submounts::{attach_copy, detach, first_error, mounted, open_below};
use crate::volumes::{mount_api, mountinfo};

/// Error from updating the share's mounts.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {}", path.display())]
pub struct SyncError {
    step: &'static str,
    /// The mount point or directory on which the step failed.
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Returns the names of the volumes with `rslave` propagation.
///
/// # Errors
/// [`SyncError`].
pub fn volumes(share: &Path) -> Result<Vec<OsString>, SyncError> {
    let stage = StagingDir::for_share(share);
    stage.receiving().map_err(|source| SyncError { step: "list the volumes in", path: stage.dir().to_owned(), source })
}

/// Mounts and unmounts submounts of volume `name` in the share, until the submounts match the volume's receiving tree.
/// Two calls for one volume must not run at the same time.
///
/// Another thread may remove the volume during the call. The call looks up only mount points. Therefore, a hanging file
/// system blocks the call only if this file system contains a mount point.
///
/// # Errors
/// The first error. After an error, the call continues with the remaining mounts.
pub fn update(share: &Path, name: &OsStr) -> Result<(), SyncError> {
    let stage = StagingDir::for_share(share);
    let error = |step, path: &Path| {
        let path = path.to_owned();
        move |source| SyncError { step, path, source }
    };
    let target = share.join(VOLUMES).join(name);
    let host_only = stage.host_only(share).map_err(error("determine which file systems are host-only for", share))?;
    let entries = mountinfo::read().map_err(error("list the mounts of", &target))?;
    update_from(&entries, (&host_only, &stage.covers()), &stage.receiving_point(name), &target)
}

fn update_from(
    entries: &[mountinfo::Entry],
    (host_only, covers): (&HostOnly, &Covers),
    point: &Path,
    target: &Path,
) -> Result<(), SyncError> {
    let error = |step, path: &Path| {
        let path = target.join(path);
        move |source| SyncError { step, path, source }
    };
    let bases = mounted(point).and_then(|from| Ok((from, mounted(target)?)));
    // While a volume is being added or removed, the receiving tree or the share's mount may be missing.
    let (Some(from), Some(to)) = bases.map_err(error("open a mount of the volume", Path::new("")))? else {
        return Ok(());
    };
    let (Some(received), Some(shared)) = (Tree::of(entries, from.id), Tree::of(entries, to.id)) else { return Ok(()) };
    let (mut received, left_out) = received.reachable(|entry| host_only.contains(entry));
    let left_out = left_out.into_iter().filter(|submount| !host_only.is_of_sandbox(submount.entry));
    received.extend(left_out.map(|submount| Submount { is_cover: true, ..submount }));
    let (mut shared, _) = shared.reachable(|entry| covers::is_permanent(entry, host_only));
    for submount in &mut shared {
        submount.is_cover = covers::is_cover(submount.entry, host_only);
    }
    let (removed, added) = differences(shared, received);
    // Each unmount includes the mounts below the submount. Therefore, `removed` omits these mounts. A lookup of their
    // paths might hang.
    let unmounted = removed.iter().map(|submount| detach(&to.file, submount).map_err(error("unmount", &submount.path)));
    let unmounted = first_error(unmounted);
    let mounted = copy_new(&from.file, target, &added, (host_only, covers));
    unmounted?;
    mounted.map_err(|(path, source)| error("mount", &path)(source))
}

/// Copies the submounts in `added` from the tree at `from` to the mount at `to`, and covers the places of host-only
/// mounts. Returns the first error, with the path of the submount.
fn copy_new(
    from: &OwnedFd,
    to: &Path,
    added: &[Submount<'_>],
    (host_only, covers): (&HostOnly, &Covers),
) -> Result<(), (PathBuf, io::Error)> {
    if added.is_empty() {
        return Ok(());
    }
    let opened: Vec<_> = added.iter().map(|submount| (submount, open_below(from, &submount.path))).collect();
    // The kernel reuses mount ids after an unmount. Therefore, an id in `added` may belong to a different mount now.
    // The fds in `opened` keep their mounts alive, so that the kernel does not reuse the ids of these mounts.
    // Therefore, the ids in this new mount list are reliable.
    let entries = mountinfo::read().map_err(|error| (PathBuf::new(), error))?;
    let results = opened.into_iter().map(|(submount, source)| {
        let copied = source.and_then(|source| {
            let id = mount_api::mount_id(source.as_fd())?;
            match entries.iter().find(|entry| entry.id == id) {
                Some(entry) if host_only.contains(entry) => covers.cover(&source, false, to, &submount.path),
                Some(_) if !submount.is_cover => attach_copy(&source, to, &submount.path),
                // The mount was unmounted, or has replaced a host-only mount. The next update finds this change.
                _ => Ok(()),
            }
        });
        copied.map_err(|error| (submount.path.clone(), error))
    });
    first_error(results)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::volumes::Share;
    use crate::volumes::test_support::{isolated, tmpfs};

    /// Returns the id of the mount at `point`.
    fn id(point: &Path) -> u64 {
        mounted(point).unwrap().unwrap().id
    }

    #[test]
    fn a_host_only_mount_with_a_reused_id_is_covered_and_not_copied() {
        isolated(|dir| {
            let stage = StagingDir::for_share(&Share::mount(dir).unwrap().host);
            let at = |path: &str| dir.join(path);
            for path in ["from", "to"] {
                tmpfs(&at(path));
                fs::create_dir(at(path).join("a")).unwrap();
            }
            tmpfs(&at("from/a"));
            let entries = mountinfo::read().unwrap();
            let old = id(&at("from/a"));
            let entry = entries.iter().find(|entry| entry.id == old).unwrap();
            let added = [Submount { path: "a".into(), entry, is_cover: false }];
            // Make `entries` outdated. The new mount gets the lowest free id, which is `old`.
            nix::mount::umount(&at("from/a")).unwrap();
            mount(Some("proc"), &at("from/a"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
            let from = mount_api::open_path(&at("from"), false).unwrap();
            copy_new(&from, &at("to"), &added, (&HostOnly::new([]).unwrap(), &stage.covers())).unwrap();
            assert!(mounted(&at("to/a")).unwrap().is_some() && fs::read_dir(at("to/a")).unwrap().count() == 0);
        });
    }
}
