//! Mounts in the share that several containers of a pod can use. This module records which container uses which mount.
//!
//! The record is a marker for each mount that a container uses: the empty file `<share>/<container>/mounts/<mount>`.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use husk_base::sync::lock;
use husk_vmm::config::JoinedMount;

use crate::volumes::mount_api;
use crate::volumes::source::Group;
use crate::volumes::staging_dir::StagingDir;
use crate::volumes::unmount::{remove, unmount};

/// Directory of the mounts in the share. The shim never removes this directory and never reuses a name in it, because
/// the guest's kernel caches directory entries.
pub use husk_proto::SHARED_VOLUMES as VOLUMES;

/// Maximum length of a name (NAME_MAX of limits.h).
const NAME_MAX: usize = 255;

/// State of the mounts. The files in the share do not show this state.
struct Mounts {
    /// Number for the next mount. A mount's name is `<number>.<key>`, or `<number>-<group>.<key>` ([`JoinedMount`]).
    next_number: u64,
    /// Mount points that no further container may use. Either the unmount has begun, or the mount could not be
    /// attached.
    retired: BTreeSet<PathBuf>,
}

/// State of all mounts. Several threads create and delete containers. The lock keeps markers and mounts consistent.
///
/// Do not hold the lock during a request to a file system of the host. If the request hung, every thread that needs the
/// lock would hang, too.
static MOUNTS: Mutex<Mounts> = Mutex::new(Mounts { next_number: 0, retired: BTreeSet::new() });

fn lock_mounts() -> MutexGuard<'static, Mounts> {
    lock(&MOUNTS)
}

/// Returns the directory of a container's markers.
pub fn markers_dir(share: &Path, id: &str) -> PathBuf {
    share.join(id).join("mounts")
}

/// A failed step and its error. The text completes an error message that begins with "failed to", for example "attach
/// the mount".
pub type Step = (&'static str, io::Error);

/// Returns whether the share has a mount with the key `key`.
///
/// # Errors
/// If the mounts cannot be listed.
pub fn is_present(share: &Path, key: &str) -> Result<bool, Step> {
    let found = lock_mounts().find(share, key);
    found.map(|name| name.is_some()).map_err(|error| ("list the mounts", error))
}

/// Creates a marker of container `id` for the mount `name`. Returns false if the share no longer has this mount.
///
/// # Errors
/// If the marker cannot be created.
pub fn acquire_named((share, id): (&Path, &str), name: &str) -> Result<bool, Step> {
    let mounts = lock_mounts();
    let target = share.join(VOLUMES).join(name);
    // Reads the directory, because a stat of the mount point could hang in the file system of the mount.
    let is_present = fs::read_dir(share.join(VOLUMES))
        .and_then(|mut entries| entries.try_fold(false, |found, entry| Ok(found || entry?.file_name() == *name)))
        .map_err(|error| ("list the mounts", error))?;
    if !is_present || mounts.retired.contains(&target) {
        return Ok(false);
    }
    mark((share, id), name).map(|()| true)
}

fn mark((share, id): (&Path, &str), name: &str) -> Result<(), Step> {
    let marked = fs::File::create(markers_dir(share, id).join(name));
    marked.map(drop).map_err(|error| ("create the marker of the mount", error))
}

/// Creates a marker of container `id` for the mount with the key `key`. Returns the mount's name. If no mount has this
/// key, attaches the tree that `copy` returns. `copy` also returns how the VMM joins the mount with others, if it does.
///
/// `copy` runs without the lock. If another thread adds the mount during `copy`, discards the tree.
pub fn acquire(
    (share, id): (&Path, &str),
    key: &str,
    directory: bool,
    copy: impl FnOnce() -> Result<(OwnedFd, Option<Group>), Step>,
) -> Result<String, Step> {
    let at = |step| move |error| (step, error);
    let mark_present = |mounts: &Mounts| {
        let present = mounts.find(share, key).map_err(at("list the mounts"))?;
        present.map(|name| mark((share, id), &name).map(|()| name)).transpose()
    };
    if let Some(name) = mark_present(&lock_mounts())? {
        return Ok(name);
    }
    // Declare `tree` before the lock's guard, so that the lock is released before the tree is dropped. The drop may
    // unmount the tree, and may hang.
    let (tree, group) = copy()?;
    let mut mounts = lock_mounts();
    if let Some(name) = mark_present(&mounts)? {
        return Ok(name);
    }
    let number = mounts.next_number;
    let joined = group.map(|Group { writable, text }| JoinedMount { writable, group: &text }.name(number, key));
    // A name that is too long for a directory is only possible with many id mappings.
    let name = joined.filter(|name| name.len() <= NAME_MAX).unwrap_or_else(|| format!("{number}.{key}"));
    mounts.next_number += 1;
    mark((share, id), &name)?;
    let target = share.join(VOLUMES).join(&name);
    let made = if directory { fs::create_dir(&target) } else { fs::File::create_new(&target).map(drop) };
    made.map_err(at("create the mount point"))?;
    let opened = mount_api::open_path(&target, false).map_err(at("open the mount point"));
    let attached = opened
        .and_then(|target| mount_api::attach_to_share(tree.as_fd(), target.as_fd()).map_err(at("attach the mount")));
    if attached.is_err() {
        // No container may use the empty mount point. `release` later removes the mount point, because container `id`
        // has a marker for the mount.
        mounts.retired.insert(target);
    }
    attached.map(|()| name)
}

/// Attaches `tree` as the receiving tree of mount `name`. Returns false if the mount already has a receiving tree,
/// or if container `id` no longer uses the mount.
pub fn add_receiving((share, id): (&Path, &str), name: &str, directory: bool, tree: &OwnedFd) -> io::Result<bool> {
    let stage = StagingDir::for_share(share);
    let mounts = lock_mounts();
    // The container may have been deleted while the caller made the tree. In this case, nothing would remove the tree.
    let is_used =
        markers_dir(share, id).join(name).try_exists()? && !mounts.retired.contains(&share.join(VOLUMES).join(name));
    if !is_used || stage.receiving()?.iter().any(|found| found == name) {
        return Ok(false);
    }
    stage.attach_receiving(tree, directory, name).map(|()| true)
}

/// Removes the markers of container `id`, and each marked mount that no other container uses. Passes the result of each
/// step to `report`. The caller may call this function again, for example after a step has failed.
pub fn release(share: &Path, id: &str, mut report: impl FnMut(&Path, io::Result<()>)) {
    let markers = markers_dir(share, id);
    let names = fs::read_dir(&markers)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
    match names {
        Ok(names) => names.iter().for_each(|name| release_mount(share, id, name, &mut report)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => report(&markers, Err(error)),
    }
}

/// Removes the marker of container `id` for mount `name`. If no other container uses the mount, first removes the
/// mount. If this removal fails, keeps the marker, so that a later call can retry.
fn release_mount(share: &Path, id: &str, name: &OsStr, report: &mut impl FnMut(&Path, io::Result<()>)) {
    let (marker, target) = (markers_dir(share, id).join(name), share.join(VOLUMES).join(name));
    let mut mounts = lock_mounts();
    match is_used_by_another(share, id, name) {
        Ok(false) => {}
        Ok(true) => return report(&marker, remove(&marker)),
        Err(error) => return report(&marker, Err(error)),
    }
    mounts.retired.insert(target.clone());
    // Release the lock before the unmount, because an unmount can hang if the file system's server hangs.
    drop(mounts);
    let stage = StagingDir::for_share(share);
    let unmounted = unmount(&target).and_then(|()| remove(&target));
    let receiving = stage.remove_receiving(name);
    let is_removed = unmounted.is_ok() && receiving.is_ok();
    report(&target, unmounted);
    report(stage.dir(), receiving);
    if is_removed {
        report(&marker, remove(&marker));
        lock_mounts().retired.remove(&target);
    }
}

/// Returns whether a container other than `id` has a marker of mount `name`.
fn is_used_by_another(share: &Path, id: &str, name: &OsStr) -> io::Result<bool> {
    for container in fs::read_dir(share)? {
        let container = container?;
        if container.file_name() != id && container.path().join("mounts").join(name).try_exists()? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Mounts {
    /// Returns the name of the mount that has the key `key` and is not retired, if any.
    fn find(&self, share: &Path, key: &str) -> io::Result<Option<String>> {
        for entry in fs::read_dir(share.join(VOLUMES))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.split_once('.').is_some_and(|(_, found)| found == key) && !self.retired.contains(&entry.path()) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use husk_base::sys::capabilities;

    use super::*;
    use crate::volumes::Share;
    use crate::volumes::test_support::{bind_for, isolated, tmpfs};

    /// Releases the mounts of container `id`. Returns the number of failed steps.
    fn failures_of_release(share: &Share, id: &str) -> usize {
        let mut failures = 0;
        release(&share.host, id, |_, result| failures += usize::from(result.is_err()));
        failures
    }

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn release_can_be_repeated_after_a_failed_unmount() {
        isolated(|dir| {
            let (share, source) = (Share::mount(dir).unwrap(), dir.join("source"));
            tmpfs(&source);
            fs::write(source.join("file"), "").unwrap();
            let stage = StagingDir::for_share(&share.host);
            let options = ["rbind", "rslave"];
            let first = bind_for(&share, "c1", &source, &options);
            // Without CAP_SYS_ADMIN, umount2(2) fails.
            let sets = capabilities::get().unwrap();
            capabilities::set(capabilities::Capabilities { effective: sets.effective & !(1 << 21), ..sets }).unwrap();
            assert!(failures_of_release(&share, "c1") > 0);
            capabilities::set(sets).unwrap();
            // After the failed unmount, the first mount may be incomplete. Therefore, container `c2` gets a new mount.
            let second = bind_for(&share, "c2", &source, &options);
            assert!(second != first && second.join("file").exists());
            assert_eq!(failures_of_release(&share, "c1"), 0);
            assert!(!first.exists() && second.join("file").exists());
            assert_eq!(entries(&markers_dir(&share.host, "c1")), 0);
            assert_eq!(failures_of_release(&share, "c2"), 0);
            assert_eq!((entries(&share.host.join(VOLUMES)), stage.receiving().unwrap().len()), (0, 0));
        });
    }

    #[test]
    fn containers_that_copy_a_source_at_the_same_time_share_one_mount() {
        isolated(|dir| {
            let (share, source) = (Share::mount(dir).unwrap(), dir.join("source"));
            tmpfs(&source);
            let copy = || {
                Ok((mount_api::clone_tree(mount_api::open_path(&source, true).unwrap().as_fd(), false).unwrap(), None))
            };
            for id in ["c1", "c2"] {
                fs::create_dir_all(markers_dir(&share.host, id)).unwrap();
            }
            let mut second = None;
            let first = acquire((&share.host, "c1"), "key", true, || {
                second = Some(acquire((&share.host, "c2"), "key", true, copy).unwrap());
                copy()
            });
            assert_eq!(first.ok(), second);
            assert_eq!(entries(&share.host.join(VOLUMES)), 1);
            assert_eq!(failures_of_release(&share, "c2"), 0);
            assert_eq!(entries(&share.host.join(VOLUMES)), 1);
            assert_eq!(failures_of_release(&share, "c1"), 0);
            assert_eq!(entries(&share.host.join(VOLUMES)), 0);
        });
    }
}
