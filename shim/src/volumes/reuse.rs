//! Finds a mount in the share that already contains the source of a bind mount.
//!
//! A container may mount a directory that another container of the pod has in another way: whole instead of a part, or
//! writable instead of read-only. With a separate mount, the guest would see different inodes for one file (see
//! [`crate::volumes::bind`]). Therefore, the container uses the mount that the share already has. The guest binds the
//! part, and applies the options of the container's mount.
//!
//! This gives the VM no access that it does not have: the mount is already in the share, with at least the same
//! rights. In case of doubt, the source gets a mount of its own. The VMM joins such mounts, if it can
//! ([`MountKey::group`]).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use husk_proto::agent::VolumeDirectory;
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::fstat,
        statvfs::{FsFlags, fstatvfs},
    },
};

use crate::host_view::{HostView, path_of};
use crate::volumes::kubelet_paths::{place_in_filesystem, stat_components};
use crate::volumes::mountinfo::Entry;
use crate::volumes::shared_mounts::VOLUMES;
use crate::volumes::source::{IGNORED_FLAGS, MountKey, Source};
use crate::volumes::staging_dir::StagingDir;
use crate::volumes::{mount_api, mountinfo};

/// A part of a mount in the share.
#[derive(Debug, PartialEq)]
pub struct Part {
    /// Name of the mount.
    pub name: String,
    /// Components of the path below the root of the mount. Empty for the whole mount.
    pub below: Vec<VolumeDirectory>,
}

/// A mount in the share that may contain the source.
struct Candidate {
    name: String,
    entry: Entry,
    /// Path of the source below the root of the mount.
    below: PathBuf,
    read_only: bool,
}

/// Finds the mounts in the share that contain `source`, whose key is `key`. The first mount is the most suitable.
///
/// The caller must check under the lock of the mounts that the mount still exists. The mounts of other file systems are
/// not accessed, because these file systems could hang.
///
/// # Errors
/// The kernel's error.
pub fn find(share: &Path, source: &Source<'_>, key: &MountKey, host: &HostView) -> io::Result<Vec<Part>> {
    let mut named = Vec::new();
    for entry in fs::read_dir(share.join(VOLUMES))? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let found = name.split_once('.').and_then(|(_, found)| MountKey::parse(found));
        if let Some(found) = found.filter(|found| key.may_be_part_of(found)) {
            named.push((name, found.is_read_only()));
        }
    }
    // Most containers end here. Otherwise, read the host's mount list, which can be long.
    if named.is_empty() {
        return Ok(Vec::new());
    }
    let Some((device, path)) = place_of(source, host)? else { return Ok(Vec::new()) };
    let volumes = fs::read_link(path_of(&mount_api::open_path(&share.join(VOLUMES), false)?))?;
    let entries = mountinfo::read()?;
    let mut candidates: Vec<Candidate> = named
        .into_iter()
        .filter_map(|(name, read_only)| {
            let point = volumes.join(&name);
            let mut at_point = entries.iter().filter(|entry| entry.point == point);
            // With a second mount at the mount point, the root of the first mount is covered.
            let (Some(entry), None) = (at_point.next(), at_point.next()) else { return None };
            let below = path.strip_prefix(&entry.root).ok()?.to_owned();
            let is_same = entry.device == device && entry.id_mapped == source.id_mappings.is_some();
            (is_same && !has_submounts(&entries, entry.id, &point.join(&below))).then(|| Candidate {
                name,
                entry: entry.clone(),
                below,
                read_only,
            })
        })
        .collect();
    // Prefer a writable mount, because a writer is more likely to use it. Then prefer the mount that contains most.
    candidates.sort_by_key(|found| (found.read_only, found.entry.root.components().count()));
    let parts = candidates.into_iter().map(|found| part_of(share, source, found));
    Ok(parts.filter_map(Result::ok).flatten().collect())
}

/// Returns the file system of the source, and the source's path in it. Returns `None` if the source needs a mount of
/// its own.
fn place_of(source: &Source<'_>, host: &HostView) -> io::Result<Option<(u64, PathBuf)>> {
    let entries = mountinfo::of_host(host)?;
    let (entry, path) = place_in_filesystem(source.file, &entries)?;
    // The id mappings of a mount of the host cannot be compared.
    if entry.id_mapped {
        return Ok(None);
    }
    let at = fs::read_link(path_of(source.file))?;
    let has_submounts = source.flags.recursive && source.directory && has_submounts(&entries, entry.id, &at);
    Ok((!has_submounts).then(|| (entry.device, Path::new("/").join(path))))
}

/// Returns whether a mount is at or below `path`, which is in the mount `id`.
fn has_submounts(entries: &[Entry], id: u64, path: &Path) -> bool {
    entries.iter().any(|entry| entry.parent == id && entry.id != id && entry.point.starts_with(path))
}

/// Returns the part of the mount that is the source. Returns `None` if the path does not lead to the source, or if the
/// mount has other rights than the source needs.
fn part_of(share: &Path, source: &Source<'_>, found: Candidate) -> io::Result<Option<Part>> {
    let Candidate { name, entry, below, .. } = found;
    let root = mount_api::open_path(&share.join(VOLUMES).join(&name), false)?;
    // A path component may be a symlink by now, or a mount may have been added.
    let file = open_in_mount(&root, &below)?;
    if mount_api::mount_id(root.as_fd())? != entry.id || mount_api::mount_id(file.as_fd())? != entry.id {
        return Ok(None);
    }
    let (here, there) = (fstat(&file)?, fstat(source.file)?);
    let is_same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino);
    let (here, there) = (fstatvfs(&file)?.flags(), fstatvfs(source.file)?.flags());
    if !is_same || !has_rights(source.flags.read_only, here, there) {
        return Ok(None);
    }
    // A volume gets its receiving tree after its mount.
    if source.receives_mounts && !StagingDir::for_share(share).receiving()?.iter().any(|found| *found == *name) {
        return Ok(None);
    }
    // The mount in the share already has the id mappings.
    let (below, _) = stat_components(&root, &below, None)?;
    Ok(Some(Part { name, below }))
}

/// Opens `path` below `root`, without following symlinks, and without leaving the mount.
fn open_in_mount(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    if path.as_os_str().is_empty() {
        return root.try_clone();
    }
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(resolve);
    Ok(openat2(root, path, how)?)
}

/// Returns whether a mount with the flags `shared` in the share can stand for a mount with the flags `host` on the
/// host. `read_only` is the container's option, which the guest applies. The guest does not apply flags of the host.
fn has_rights(read_only: bool, shared: FsFlags, host: FsFlags) -> bool {
    let is_read_only = |flags: FsFlags| flags.contains(FsFlags::ST_RDONLY);
    let ignored = IGNORED_FLAGS | FsFlags::ST_RDONLY;
    (read_only || is_read_only(shared) == is_read_only(host)) && shared - ignored == host - ignored
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::spec::Mount;
    use crate::volumes::Share;
    use crate::volumes::source::Flags;
    use crate::volumes::test_support::{bind_for, isolated, tmpfs};

    #[test]
    fn part_of_checks_where_the_path_leads() {
        isolated(|dir| {
            let (share, volume) = (Share::mount(dir).unwrap(), dir.join("volume"));
            tmpfs(&volume);
            for name in ["sub", "other"] {
                fs::create_dir(volume.join(name)).unwrap();
            }
            std::os::unix::fs::symlink("sub", volume.join("link")).unwrap();
            let whole = bind_for(&share, "c1", &volume, &["rbind"]);
            let file = mount_api::open_path(&volume.join("sub"), false).unwrap();
            let entries = mountinfo::read().unwrap();
            let entry = entries.iter().find(|entry| entry.point == whole).unwrap();
            let part = |below: &str, id: u64| {
                let source = Source {
                    file: &file,
                    directory: true,
                    id_mappings: None,
                    flags: Flags::of(&Mount::default()),
                    ignores_mount_id: false,
                    receives_mounts: false,
                    private: false,
                };
                let name = whole.file_name().unwrap().to_str().unwrap().to_owned();
                let entry = Entry { id, ..entry.clone() };
                let found =
                    part_of(&share.host, &source, Candidate { name, entry, below: below.into(), read_only: false });
                found
                    .ok()
                    .flatten()
                    .map(|part| part.below.into_iter().map(|directory| directory.name).collect::<Vec<_>>())
            };
            assert_eq!(part("sub", entry.id), Some(vec!["sub".to_owned()]));
            for below in ["other", "link", "none", "", "other/../sub", "../volume/sub"] {
                assert_eq!(part(below, entry.id), None, "{below}");
            }
            // Another mount has replaced the mount.
            assert_eq!(part("sub", entry.id + 1), None);
            share.unmount();
        });
    }

    #[test]
    fn has_rights_compares_the_flags_that_the_guest_does_not_apply() {
        let (none, read_only, no_exec) = (FsFlags::empty(), FsFlags::ST_RDONLY, FsFlags::ST_NOEXEC);
        for (option, shared, host, expected) in [
            (false, no_exec, none, true),
            (false, none, no_exec, true),
            (false, read_only, none, false),
            (false, none, read_only, false),
            (false, read_only, read_only, true),
            (true, none, none, true),
            (true, read_only, none, true),
            (true, none, read_only, true),
            (true, none, FsFlags::ST_NOATIME, false),
            (false, FsFlags::ST_NOATIME, FsFlags::ST_NOATIME, true),
        ] {
            assert_eq!(has_rights(option, shared, host), expected, "{option} {shared:?} {host:?}");
        }
    }
}
