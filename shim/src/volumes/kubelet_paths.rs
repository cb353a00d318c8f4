//! Recognizes the kubelet's volume directories. For a mount's source, finds the volume and the subdirectory in the
//! volume.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use husk_proto::agent::VolumeDirectory;
use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, fstat},
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};

use crate::host_view::HostView;
use crate::oci::id_mappings::IdMappings;
use crate::volumes::mountinfo::Entry;
use crate::volumes::{mount_api, mountinfo};

/// An emptyDir on a disk, or a subdirectory in an emptyDir. The guest accesses the directory through virtio-fs.
#[derive(Debug)]
pub struct DiskEmptyDir {
    /// The volume's directory.
    pub root: OwnedFd,
    /// The components of the subdirectory's path. Empty for the whole volume.
    pub subdirectory: Vec<VolumeDirectory>,
}

/// Finds the emptyDir that contains `source`, a file or directory opened at `path`. Returns `None` if `source` is not
/// in an emptyDir of the pod with uid `pod`, or if the emptyDir is a tmpfs (medium Memory).
///
/// An emptyDir belongs to a single pod. Therefore, the caller can bind the whole volume into the share. For each
/// container, the guest selects the subdirectory and applies the read-only option. With a separate mount for each
/// container, the containers would see different inodes for one file (see [`crate::volumes::bind`]).
///
/// # Errors
/// The kernel's error.
pub fn disk_empty_dir(
    source: &OwnedFd,
    path: &Path,
    id_mappings: Option<&IdMappings>,
    (pod, host): (&str, &HostView),
) -> io::Result<Option<DiskEmptyDir>> {
    let Some((_, root)) = parse_empty_dir(path) else { return Ok(None) };
    // The source may be a hostPath that points into another pod's volume.
    if !is_third_ancestor(&root, pod) {
        return Ok(None);
    }
    let volume = match host.open(&root, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        volume => volume?,
    };
    if fstatfs(&volume)?.filesystem_type() == TMPFS_MAGIC {
        return Ok(None);
    }
    if device_and_inode(&volume)? == device_and_inode(source)? {
        return Ok(Some(DiskEmptyDir { root: volume, subdirectory: Vec::new() }));
    }
    let found = path_from_volume(&volume, source, id_mappings, host)?;
    Ok(found.map(|(_, subdirectory)| DiskEmptyDir { root: volume, subdirectory }))
}

/// Finds the directory `volume` and `source` in their file system. Returns the path of `volume` from the root of the
/// file system, and the components of the path from `volume` to `source`. Returns `None` if `source` is not in the
/// volume, or is no longer there.
///
/// # Errors
/// The kernel's error.
pub fn path_from_volume(
    volume: &OwnedFd,
    source: &OwnedFd,
    id_mappings: Option<&IdMappings>,
    host: &HostView,
) -> io::Result<Option<(PathBuf, Vec<VolumeDirectory>)>> {
    // The kubelet binds a subPath to a mount point outside the volume. Therefore, the shim compares the volume's
    // path and the source's path, both relative to the root of the file system. The mount list can be long.
    let mounts = mountinfo::of_host(host)?;
    let path = |file| match place_in_filesystem(file, &mounts) {
        // The mount was unmounted after the file had been opened.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        place => place.map(|(_, path)| Some(path)),
    };
    let (Some(all), Some(part)) = (path(volume)?, path(source)?) else { return Ok(None) };
    let Ok(subdirectory) = part.strip_prefix(&all) else { return Ok(None) };
    // If the source was renamed or removed, or a mount covers a part of the path, the path does not lead to the source.
    match stat_components(volume, subdirectory, id_mappings) {
        Ok((subdirectory, end)) => Ok((end == device_and_inode(source)?).then_some((all, subdirectory))),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns whether `path` is the kubelet's mount point for a `subPath`. The kubelet creates a mount for each container
/// that uses the `subPath` (Kubernetes, pkg/volume/util/subpath/subpath_linux.go, `doBindSubPath`).
pub fn is_sub_path(path: &Path) -> bool {
    is_third_ancestor(path, "volume-subpaths")
}

/// Returns whether the third directory above `path` has the name `name`.
fn is_third_ancestor(path: &Path, name: &str) -> bool {
    path.ancestors().nth(3).and_then(Path::file_name).is_some_and(|found| found == name)
}

fn device_and_inode(file: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Finds the name and the directory of the emptyDir to which `path` belongs. `path` is in the volume
/// (`<pod>/volumes/kubernetes.io~empty-dir/<name>`) or in a subPath's directory
/// (`<pod>/volume-subpaths/<name>/<container>/<number>`).
pub fn parse_empty_dir(path: &Path) -> Option<(String, PathBuf)> {
    let parts: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
    let found = parts.windows(3).enumerate().rev().find_map(|(at, part)| match part {
        ["volumes", "kubernetes.io~empty-dir", name] | ["volume-subpaths", name, _] => Some((at, *name)),
        _ => None,
    });
    let (at, name) = found?;
    let pod: PathBuf = path.components().take(at).collect();
    Some((name.to_owned(), pod.join("volumes/kubernetes.io~empty-dir").join(name)))
}

/// Returns the mount of `source`, and the path of `source` relative to the root of its file system. `mounts` is the
/// host's mount list, which shows the directory of the file system that is mounted (proc_pid_mountinfo(5)).
///
/// # Errors
/// The kernel's error, or [`io::ErrorKind::NotFound`] if the mount is not in the list.
pub fn place_in_filesystem<'a>(source: &OwnedFd, mounts: &'a [Entry]) -> io::Result<(&'a Entry, PathBuf)> {
    let id = mount_api::mount_id(source.as_fd())?;
    let path = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
    let mount = mounts.iter().find(|mount| mount.id == id).ok_or(io::ErrorKind::NotFound)?;
    let subdirectory = path.strip_prefix(&mount.point).map_err(io::Error::other)?;
    Ok((mount, mount.root.strip_prefix("/").map_err(io::Error::other)?.join(subdirectory)))
}

/// Returns the name, mode and owner of each component of `subdirectory`, a path below `volume`. Also returns the device
/// and inode of the final component.
///
/// Does not follow symlinks, because a guest that can write to the volume may have created them.
///
/// # Errors
/// If a component does not exist, or is not a plain UTF-8 name.
pub fn stat_components(
    volume: &OwnedFd,
    subdirectory: &Path,
    id_mappings: Option<&IdMappings>,
) -> io::Result<(Vec<VolumeDirectory>, (u64, u64))> {
    let (mut here, mut directories) = (volume.try_clone()?, Vec::new());
    for part in subdirectory.components() {
        let Component::Normal(name) = part else { return Err(io::ErrorKind::InvalidInput.into()) };
        here = openat(&here, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&here)?;
        let (uid, gid) = owner(stat.st_uid, stat.st_gid, id_mappings);
        let name = name.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        directories.push(VolumeDirectory { name, mode: stat.st_mode & 0o7777, uid, gid, ..Default::default() });
    }
    Ok((directories, device_and_inode(&here)?))
}

/// Translates a file's owner on the host to the owner that the guest sees. With `id_mappings`, the guest sees the file
/// through an id-mapped mount.
pub fn owner(uid: u32, gid: u32, id_mappings: Option<&IdMappings>) -> (u32, u32) {
    match id_mappings {
        Some(id_mappings) => id_mappings.owner(uid, gid),
        None => (uid, gid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_empty_dir_finds_the_volume() {
        let pod = "/var/lib/kubelet/pods/5e1c";
        let root = PathBuf::from(format!("{pod}/volumes/kubernetes.io~empty-dir/cache"));
        let expected = Some(("cache".to_owned(), root));
        for path in ["volumes/kubernetes.io~empty-dir/cache", "volumes/kubernetes.io~empty-dir/cache/a/b"] {
            assert_eq!(parse_empty_dir(Path::new(&format!("{pod}/{path}"))), expected, "{path}");
        }
        assert_eq!(parse_empty_dir(Path::new(&format!("{pod}/volume-subpaths/cache/web/0"))), expected);
        assert_eq!(parse_empty_dir(Path::new(&format!("{pod}/volumes/kubernetes.io~secret/cache"))), None);
        assert_eq!(parse_empty_dir(Path::new("/dev/shm")), None);
    }

    #[test]
    fn disk_empty_dir_finds_volume_and_subdirectory() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path().join("uid/volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "x").unwrap();
        let at = |path: &Path, pod| {
            let host = HostView::own();
            disk_empty_dir(&host.open(path, true).unwrap(), path, None, (pod, &host)).unwrap()
        };
        let of = |path: &Path| {
            let found = at(path, "uid");
            found.map(|found| found.subdirectory.into_iter().map(|part| part.name).collect::<Vec<_>>().join("/"))
        };
        assert_eq!(of(&root).unwrap(), "");
        assert_eq!(of(&root.join("a/b")).unwrap(), "a/b");
        assert_eq!(of(&root.join("a/file")).unwrap(), "a/file");
        assert!(of(dir.path()).is_none() && at(&root, "another").is_none());
        // The target of this symlink is not in the volume.
        std::os::unix::fs::symlink("/etc", root.join("out")).unwrap();
        assert_eq!(of(&root.join("out")), None);
    }

    #[test]
    fn source_whose_mount_is_gone_is_in_no_empty_dir() {
        use crate::volumes::memory_volume;
        use crate::volumes::test_support::{isolated, tmpfs};
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        isolated(|_| {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            let host = HostView::own();
            for (name, is_memory) in [("disk", false), ("memory", true)] {
                let volume = dir.path().join("uid/volumes/kubernetes.io~empty-dir").join(name);
                let point = dir.path().join("uid/volume-subpaths").join(name).join("c/0");
                fs::create_dir_all(&volume).unwrap();
                if is_memory {
                    tmpfs(&volume);
                }
                fs::create_dir_all(volume.join("sub")).unwrap();
                fs::create_dir_all(&point).unwrap();
                mount(Some(&volume.join("sub")), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
                let source = host.open(&point, true).unwrap();
                let find = || {
                    let memory = memory_volume::request_for(&source, &point, None, ("c", 0), &host).unwrap();
                    let disk = disk_empty_dir(&source, &point, None, ("uid", &host)).unwrap();
                    [disk.map(|disk| disk.subdirectory), memory.map(|memory| memory.directories)]
                };
                let found = find().map(|found| found.map(|found| found[0].name.clone()));
                let sub = Some("sub".to_owned());
                assert_eq!(found, if is_memory { [None, sub] } else { [sub, None] });
                // A rename leads to no error, either.
                fs::rename(volume.join("sub"), volume.join("renamed")).unwrap();
                fs::create_dir(volume.join("sub")).unwrap();
                assert!(find().iter().flatten().all(|found| found[0].name == "renamed"));
                umount2(&point, MntFlags::MNT_DETACH).unwrap();
                assert!(find().iter().all(Option::is_none), "{name}");
                if is_memory {
                    umount2(&volume, MntFlags::MNT_DETACH).unwrap();
                }
            }
        });
    }

    #[test]
    fn is_sub_path_recognizes_the_mount_point_of_a_sub_path() {
        assert!(is_sub_path(Path::new("/var/lib/kubelet/pods/u/volume-subpaths/data/web/0")));
        assert!(!is_sub_path(Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/data/mount")));
    }
}
