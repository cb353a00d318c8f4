//! Host directories and files in the share: each is bound once for the whole pod, however many of its containers have it.
//!
//! The guest's file system knows a file by the mount it is reached by (virtiofsd, `passthrough::InodeIds`), so of two
//! mounts of one directory it would make two sets of inodes, and a fifo, a socket or a lock in one would be none in the
//! other. What a container uses is marked by an empty file of the mount's name in `<share>/<container>/mounts`.

/// Where the mounts are in the share. It stays, and no name in it comes twice: the guest's kernel may know a directory's
/// old entry for a while.
pub use husk_proto::SHARED_VOLUMES as VOLUMES;

use crate::oci::id_mappings::IdMappings;
use crate::oci::spec::Mount;
use crate::volumes::error::VolumeError;
use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_api;
use crate::volumes::stage::{StagingDir, SyncError};
use crate::volumes::unmount::{remove, unmount};
use nix::sys::{stat::fstat, statvfs::fstatvfs};
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Held while marks and mounts are looked at together: containers come and go on threads of their own.
static NEXT_NUMBER: Mutex<u64> = Mutex::new(0);

/// Guards the number that the next mount's name begins with.
fn lock_mounts() -> MutexGuard<'static, u64> {
    NEXT_NUMBER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A container's marks.
pub fn markers_dir(share: &Path, id: &str) -> PathBuf {
    share.join(id).join("mounts")
}

/// What is bound.
pub struct Source<'a> {
    /// The directory or file.
    pub file: &'a OwnedFd,
    /// Which of both.
    pub directory: bool,
    /// Whom its files are to belong to, where that is not whom they say.
    pub id_mappings: Option<&'a IdMappings>,
    /// How it is mounted.
    pub flags: Flags,
    /// Whether it is the same by whichever of the host's mounts it is reached.
    pub ignores_mount_id: bool,
    /// Whether the guest is to see what the host mounts there later.
    pub receives_mounts: bool,
}

/// Binds `source` into the share for container `id`, unless it is there; gives the guest's path of it. `notes` gets what
/// is left out of it.
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
    let mut next_number = lock_mounts();
    let present = find_mount(share, &key).map_err(host("list the mounts"))?;
    let name = present.clone().unwrap_or_else(|| format!("{}.{key}", *next_number));
    let guest = format!("{}/{VOLUMES}/{name}", husk_proto::GUEST_SHARE);
    fs::File::create(markers_dir(share, id).join(&name)).map_err(host("mark the mount"))?;
    let stage = StagingDir::for_share(share);
    if present.is_none() {
        *next_number += 1;
        let target = share.join(VOLUMES).join(&name);
        let made = if source.directory { fs::create_dir(&target) } else { fs::File::create_new(&target).map(drop) };
        made.map_err(host("create the mount point"))?;
        let left_out = attach(source, &target, host_only, (&stage, &name)).map_err(|(step, source)| {
            // Nobody is to take the mount point for the mount.
            let _ = remove(&target);
            host(step)(source)
        })?;
        if !left_out.is_empty() {
            let source = mount.source.as_deref().unwrap_or_default();
            notes.push(format!("host-only file systems are left out of {source}: {}", left_out.join(", ")));
        }
    }
    if source.receives_mounts && !stage.has_receiving(&name) {
        // What it lacks in the share by now, the next update makes up for.
        stage_receiving_tree(source, host_only, (&stage, &name)).map_err(|(step, source)| host(step)(source))?;
    }
    Ok(guest)
}

type Step = (&'static str, io::Error);

/// Attaches a copy of the source's mounts at `target`; gives the places of those that are left out.
fn attach(
    source: &Source<'_>,
    target: &Path,
    host_only: &HostOnly,
    (stage, name): (&StagingDir, &str),
) -> Result<Vec<String>, Step> {
    let (at, flags) = (|step| move |error| (step, error), &source.flags);
    // Nothing is mounted below a file.
    let recursive = flags.recursive && source.directory;
    let mut tree = clone_source(source, recursive, libc::MS_PRIVATE)?;
    let mut left_out = Vec::new();
    if recursive {
        (tree, left_out) = stage.copy(&tree, host_only, name).map_err(at("copy its submounts"))?;
    }
    if let Some(id_mappings) = source.id_mappings {
        let user_namespace = id_mappings.namespace().map_err(at("make a user namespace for its mapped ids"))?;
        // What is mounted below may be of a kind that cannot be mapped: that is refused, as runc does.
        mount_api::set_id_mappings(tree.as_fd(), user_namespace.as_fd(), recursive).map_err(at("map its user ids"))?;
    }
    if flags.read_only {
        // Here as well as in the guest, so that a guest that owns its kernel still cannot write.
        mount_api::set_attr(tree.as_fd(), mount_api::MOUNT_ATTR_RDONLY, 0, flags.read_only_submounts)
            .map_err(at("make it read-only"))?;
    }
    let target = mount_api::open_path(target, false).map_err(at("open the mount point"))?;
    mount_api::attach(tree.as_fd(), target.as_fd()).map_err(at("attach it"))?;
    Ok(left_out)
}

/// Stages a copy of the source's mounts that receives what the host mounts later.
fn stage_receiving_tree(
    source: &Source<'_>,
    host_only: &HostOnly,
    (stage, name): (&StagingDir, &str),
) -> Result<(), Step> {
    let tree = clone_source(source, source.flags.recursive && source.directory, libc::MS_SLAVE)?;
    let kept = stage.add_receiving(&tree, host_only, source.directory, name);
    kept.map_err(|error| ("stage a copy that receives later mounts", error))
}

/// A detached copy of the source's mounts, of this propagation.
fn clone_source(source: &Source<'_>, recursive: bool, propagation: u64) -> Result<OwnedFd, Step> {
    let at = |step| move |error| (step, error);
    let tree = mount_api::clone_tree(source.file.as_fd(), recursive).map_err(at("copy the source's mounts"))?;
    mount_api::set_attr(tree.as_fd(), 0, propagation, true).map_err(at("set the propagation"))?;
    Ok(tree)
}

/// Mounts and unmounts in the share what the host has mounted and unmounted in the volumes with `rslave` propagation. Calls
/// must not overlap.
///
/// # Errors
/// The first error; everything else is attempted.
pub fn sync(share: &Path) -> Result<(), SyncError> {
    let stage = StagingDir::for_share(share);
    stage.sync(&share.join(VOLUMES), &stage.host_only(share)?)
}

/// Takes away what only container `id` uses; any number of times. `note` gets what came of each step.
pub fn release(share: &Path, id: &str, mut note: impl FnMut(&Path, io::Result<()>)) {
    let (markers, stage) = (markers_dir(share, id), StagingDir::for_share(share));
    let _guard = lock_mounts();
    let entries = match fs::read_dir(&markers) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return note(&markers, Err(error)),
    };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        let marker = markers.join(&name);
        note(&marker, remove(&marker));
        let used = fs::read_dir(share).into_iter().flatten().flatten();
        if !used.map(|container| container.path().join("mounts").join(&name)).any(|marker| marker.exists()) {
            let target = share.join(VOLUMES).join(&name);
            note(&target, unmount(&target).and_then(|()| remove(&target)));
            note(stage.dir(), stage.remove_receiving(&name));
        }
    }
}

/// The name of the mount of this kind, if there is one.
fn find_mount(share: &Path, key: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(share.join(VOLUMES))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.split_once('.').is_some_and(|(_, found)| found == key) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// What tells one mount from another: what is mounted, as seen by which of the host's mounts, and how.
fn mount_key(source: &Source<'_>) -> io::Result<String> {
    let stat = fstat(source.file)?;
    // Where the mount does not matter, what it allows does.
    let mount = match source.ignores_mount_id {
        true => format!("m{:x}", fstatvfs(source.file)?.flags().bits()),
        false => format!("{:x}", mount_api::mount_id(source.file.as_fd())?),
    };
    let Flags { recursive, read_only, read_only_submounts, slave } = &source.flags;
    let flags: u8 = u8::from(*recursive) | u8::from(*read_only) << 1 | u8::from(*read_only_submounts) << 2;
    let flags = flags | u8::from(*slave) << 3;
    Ok(format!("{:x}-{:x}-{mount}-{flags:x}", stat.st_dev, stat.st_ino))
}

/// What the host does of a bind mount's options.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    recursive: bool,
    /// Whether nobody is to write to it.
    pub read_only: bool,
    read_only_submounts: bool,
    /// Whether what the host mounts later is to be seen.
    pub slave: bool,
}

impl Flags {
    /// Those of `mount`.
    pub fn of(mount: &Mount) -> Self {
        let mut flags = Self { recursive: false, read_only: false, read_only_submounts: false, slave: false };
        for option in mount.options() {
            match option.as_str() {
                "rbind" => flags.recursive = true,
                "ro" => flags.read_only = true,
                "rw" => flags.read_only = false,
                "rro" => (flags.read_only, flags.read_only_submounts) = (true, true),
                // Of what the host mounts there later, the guest sees each at its first look.
                "slave" | "rslave" => flags.slave = true,
                _ => {}
            }
        }
        flags
    }

    /// Those of a mount that is everybody's, and of which the guest says who may write and who sees what is mounted later.
    pub fn enforced_by_guest() -> Self {
        Self { recursive: true, read_only: false, read_only_submounts: false, slave: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_decide_what_the_host_does() {
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
