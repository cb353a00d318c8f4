//! Binds host directories and files into the share: once for the whole pod, even if several containers use them.
//!
//! The virtio-fs server tells files apart by the mount through which they are reached (virtiofsd,
//! `passthrough::InodeIds`). Two mounts of one directory would give the guest two sets of inodes: a fifo, a socket or a
//! lock in one would not work in the other. Each mount that a container uses is marked by an empty file with the
//! mount's name in `<share>/<container>/mounts`.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::sys::{stat::fstat, statvfs::fstatvfs};

use crate::oci::id_mappings::IdMappings;
use crate::oci::spec::Mount;
use crate::volumes::error::VolumeError;
use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_api;
use crate::volumes::staging_dir::StagingDir;
use crate::volumes::unmount::{remove, unmount};

/// Directory of the mounts in the share. It is never removed, and no name in it is reused, because the guest's kernel
/// may cache a directory's old entry for a while.
pub use husk_proto::SHARED_VOLUMES as VOLUMES;

/// What the names in the share do not say about its mounts.
struct Mounts {
    /// Number with which the name of the next mount begins.
    next_number: u64,
    /// Mount points whose mounts no further container gets: their unmount has begun, and may have failed.
    retired: BTreeSet<PathBuf>,
}

/// The lock is held while markers and mounts must be consistent: containers are created and deleted on separate threads.
static MOUNTS: Mutex<Mounts> = Mutex::new(Mounts { next_number: 0, retired: BTreeSet::new() });

/// Locks markers and mounts.
fn lock_mounts() -> MutexGuard<'static, Mounts> {
    MOUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the directory of a container's markers.
pub fn markers_dir(share: &Path, id: &str) -> PathBuf {
    share.join(id).join("mounts")
}

/// The source of a bind mount.
pub struct Source<'a> {
    /// The directory or file.
    pub file: &'a OwnedFd,
    /// True for a directory.
    pub directory: bool,
    /// Id mappings of an id-mapped mount.
    pub id_mappings: Option<&'a IdMappings>,
    /// Mount options that the host applies.
    pub flags: Flags,
    /// Use one mount for a file or directory, even if the host reaches it through several mounts.
    pub ignores_mount_id: bool,
    /// Propagate the host's later mounts to the guest.
    pub receives_mounts: bool,
}

/// Binds `source` into the share for container `id`, unless it is there already. Returns its path in the guest.
///
/// Host-only file systems that are left out are added to `notes`.
pub fn bind(
    mount: &Mount,
    source: &Source<'_>,
    (share, id): (&Path, &str),
    host_only: &HostOnly,
    notes: &mut Vec<String>,
) -> Result<String, VolumeError> {
    let host = |step| {
        move |source| VolumeError::Host {
            mount_source: mount.source.clone().unwrap_or_default(),
            destination: mount.destination.clone(),
            step,
            source,
        }
    };
    let key = mount_key(source).map_err(host("stat the source"))?;
    let key = source.id_mappings.map_or(key.clone(), |id_mappings| format!("{key}-{}", id_mappings.tag()));
    let mut mounts = lock_mounts();
    let present = mounts.find(share, &key).map_err(host("list the mounts"))?;
    let name = present.clone().unwrap_or_else(|| format!("{}.{key}", mounts.next_number));
    let guest = format!("{}/{VOLUMES}/{name}", husk_proto::GUEST_SHARE);
    fs::File::create(markers_dir(share, id).join(&name)).map_err(host("create the marker of the mount"))?;
    let stage = StagingDir::for_share(share);
    if present.is_none() {
        mounts.next_number += 1;
        let target = share.join(VOLUMES).join(&name);
        let made = if source.directory { fs::create_dir(&target) } else { fs::File::create_new(&target).map(drop) };
        made.map_err(host("create the mount point"))?;
        let left_out = attach(source, &target, host_only, (&stage, &name)).map_err(|(step, source)| {
            // Otherwise `find` would find the empty mount point.
            let _ = remove(&target);
            host(step)(source)
        })?;
        if !left_out.is_empty() {
            let source = mount.source.as_deref().unwrap_or_default();
            notes.push(format!("host-only file systems are left out of {source}: {}", left_out.join(", ")));
        }
    }
    if source.receives_mounts && !stage.has_receiving(&name) {
        // The next update adds the mounts that are still missing in the share.
        stage_receiving_tree(source, host_only, (&stage, &name)).map_err(|(step, source)| host(step)(source))?;
    }
    Ok(guest)
}

type Step = (&'static str, io::Error);

/// Attaches a copy of the source's mounts at `target`. Returns the paths of the mounts that are left out.
fn attach(
    source: &Source<'_>,
    target: &Path,
    host_only: &HostOnly,
    (stage, name): (&StagingDir, &str),
) -> Result<Vec<String>, Step> {
    let (at, flags) = (|step| move |error| (step, error), &source.flags);
    // A file has no submounts.
    let recursive = flags.recursive && source.directory;
    let mut tree = clone_source(source, recursive, libc::MS_PRIVATE)?;
    let mut left_out = Vec::new();
    if recursive {
        (tree, left_out) = stage.copy(&tree, host_only, name).map_err(at("copy the submounts"))?;
    }
    if let Some(id_mappings) = source.id_mappings {
        let user_namespace = id_mappings.namespace().map_err(at("create a user namespace with the id mappings"))?;
        // Fails if the file system of a submount does not support id-mapped mounts, as with runc.
        mount_api::set_id_mapping(tree.as_fd(), user_namespace.as_fd(), recursive)
            .map_err(at("set the id mappings"))?;
    }
    if flags.read_only {
        // On the host as well as in the guest, so that a guest with a compromised kernel still cannot write.
        mount_api::set_attributes(tree.as_fd(), mount_api::MOUNT_ATTR_RDONLY, 0, flags.read_only_submounts)
            .map_err(at("make the mount read-only"))?;
    }
    let target = mount_api::open_path(target, false).map_err(at("open the mount point"))?;
    mount_api::attach(tree.as_fd(), target.as_fd()).map_err(at("attach the mount"))?;
    Ok(left_out)
}

/// Prepares the receiving tree: a copy of the source's mounts that receives the host's later mounts.
fn stage_receiving_tree(
    source: &Source<'_>,
    host_only: &HostOnly,
    (stage, name): (&StagingDir, &str),
) -> Result<(), Step> {
    let tree = clone_source(source, source.flags.recursive && source.directory, libc::MS_SLAVE)?;
    let added = stage.add_receiving(&tree, host_only, source.directory, name);
    added.map_err(|error| ("stage a copy that receives later mounts", error))
}

/// Returns a detached copy of the source's mounts with the given propagation.
fn clone_source(source: &Source<'_>, recursive: bool, propagation: u64) -> Result<OwnedFd, Step> {
    let at = |step| move |error| (step, error);
    let tree = mount_api::clone_tree(source.file.as_fd(), recursive).map_err(at("copy the source's mounts"))?;
    mount_api::set_attributes(tree.as_fd(), 0, propagation, true).map_err(at("set the propagation"))?;
    Ok(tree)
}

/// Removes the mounts that only container `id` uses. May be repeated. `report` receives the result of each step.
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

/// Removes the marker of container `id` for mount `name`. If no other container uses the mount, the mount is removed
/// first. The marker stays if that fails, so that the next call finds the mount.
fn release_mount(share: &Path, id: &str, name: &OsStr, report: &mut impl FnMut(&Path, io::Result<()>)) {
    let (marker, target) = (markers_dir(share, id).join(name), share.join(VOLUMES).join(name));
    let mut mounts = lock_mounts();
    match is_used_by_another(share, id, name) {
        Ok(false) => {}
        Ok(true) => return report(&marker, remove(&marker)),
        Err(error) => return report(&marker, Err(error)),
    }
    mounts.retired.insert(target.clone());
    // The last reference to a file system may go with the mount, and its server may hang.
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
    /// Returns the name of the mount with this key, if there is one that a container can get.
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

/// Returns the key that identifies a mount: its source, the host's mount through which it is reached, and its flags.
fn mount_key(source: &Source<'_>) -> io::Result<String> {
    let stat = fstat(source.file)?;
    // Instead of the mount id, the mount's flags (such as read-only) are part of the key.
    let mount = match source.ignores_mount_id {
        true => format!("m{:x}", fstatvfs(source.file)?.flags().bits()),
        false => format!("{:x}", mount_api::mount_id(source.file.as_fd())?),
    };
    let Flags { recursive, read_only, read_only_submounts, slave } = &source.flags;
    let flags: u8 = u8::from(*recursive) | u8::from(*read_only) << 1 | u8::from(*read_only_submounts) << 2;
    let flags = flags | u8::from(*slave) << 3;
    Ok(format!("{:x}-{:x}-{mount}-{flags:x}", stat.st_dev, stat.st_ino))
}

/// The options of a bind mount that the host applies.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    recursive: bool,
    /// Nobody may write to the mount.
    pub read_only: bool,
    read_only_submounts: bool,
    /// The mount is a slave of the host's mount (mount_namespaces(7)), so it receives later mounts.
    pub slave: bool,
}

impl Flags {
    /// Returns the flags of `mount`.
    pub fn of(mount: &Mount) -> Self {
        let mut flags = Self { recursive: false, read_only: false, read_only_submounts: false, slave: false };
        for option in mount.options() {
            match option.as_str() {
                "rbind" => flags.recursive = true,
                "ro" => flags.read_only = true,
                "rw" => flags.read_only = false,
                "rro" => (flags.read_only, flags.read_only_submounts) = (true, true),
                // `slave` counts as `rslave`: the guest receives later mounts at every depth.
                "slave" | "rslave" => flags.slave = true,
                _ => {}
            }
        }
        flags
    }

    /// Returns the flags of a mount that all containers of the pod share. The guest enforces for each container whether
    /// it may write, and whether it receives later mounts.
    pub fn enforced_by_guest() -> Self {
        Self { recursive: true, read_only: false, read_only_submounts: false, slave: false }
    }
}

#[cfg(test)]
mod tests {
    use husk_base::sys::capabilities;

    use super::*;
    use crate::volumes::Share;
    use crate::volumes::test_support::{isolated, tmpfs};

    /// Binds `source` for container `id`. Returns the mount's path in the share.
    fn bind_for(share: &Share, id: &str, source: &Path, options: &[&str]) -> PathBuf {
        fs::create_dir_all(markers_dir(&share.host, id)).unwrap();
        let options = Some(options.iter().map(ToString::to_string).collect());
        let mount = Mount { kind: Some("bind".into()), options, ..Mount::default() };
        let (file, flags) = (mount_api::open_path(source, true).unwrap(), Flags::of(&mount));
        let receives_mounts = flags.slave;
        let source =
            Source { file: &file, directory: true, id_mappings: None, flags, ignores_mount_id: false, receives_mounts };
        let host_only = StagingDir::for_share(&share.host).host_only(&share.host).unwrap();
        let guest = bind(&mount, &source, (&share.host, id), &host_only, &mut Vec::new()).unwrap();
        share.host.join(Path::new(&guest).strip_prefix(husk_proto::GUEST_SHARE).unwrap())
    }

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
            // The mount may be incomplete, so the next container gets another.
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
    fn of_reads_the_options_that_the_host_applies() {
        let of = |options: &[&str]| {
            let options = Some(options.iter().map(ToString::to_string).collect());
            let (kind, source) = (Some("bind".into()), Some("/a".into()));
            Flags::of(&Mount { destination: "/b".into(), kind, source, options, ..Mount::default() })
        };
        let plain = Flags { recursive: true, read_only: false, read_only_submounts: false, slave: false };
        assert_eq!(of(&["rbind", "rw", "nosuid", "rprivate"]), plain);
        assert!(of(&["bind", "ro", "rslave"]).slave);
        assert!(of(&["bind", "ro"]).read_only && !of(&["bind", "ro"]).read_only_submounts && !of(&["bind"]).recursive);
        assert!(of(&["rbind", "rro"]).read_only_submounts);
    }
}
