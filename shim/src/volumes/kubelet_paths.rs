//! What the kubelet makes for a pod's volumes on the node: where they lie, and what a `subPath` is of them.

use crate::oci::id_mappings::IdMappings;
use crate::volumes::{mount_api, mountinfo};
use husk_proto::agent::VolumeDirectory;
use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, fstat},
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};
use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

/// An emptyDir that the guest has by virtio-fs, or a part of it.
#[derive(Debug)]
pub struct DiskEmptyDir {
    /// The volume.
    pub root: OwnedFd,
    /// The part, component by component; none for all of it.
    pub subdirectory: Vec<VolumeDirectory>,
}

/// The emptyDir of the pod with uid `pod` that the file or directory `source`, found at `path`, is or is part of; none when
/// it is no such volume's, or one in memory.
///
/// An emptyDir is one pod's alone, so the guest may have all of it at once: whether a container may write to it, and
/// which part of it a container has, is then for the guest to hold. By a mount of its own, each would have inodes of its
/// own (see [`crate::volumes::bind`]).
///
/// # Errors
/// What the kernel says.
pub fn disk_empty_dir(
    source: &OwnedFd,
    path: &Path,
    id_mappings: Option<&IdMappings>,
    pod: &str,
) -> io::Result<Option<DiskEmptyDir>> {
    let Some((_, root)) = parse_empty_dir(path) else { return Ok(None) };
    // A hostPath may lead into another pod's.
    if !is_third_ancestor(&root, pod) {
        return Ok(None);
    }
    let volume = match mount_api::open_path(&root, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        volume => volume?,
    };
    if fstatfs(&volume)?.filesystem_type() == TMPFS_MAGIC {
        return Ok(None);
    }
    if device_and_inode(&volume)? == device_and_inode(source)? {
        return Ok(Some(DiskEmptyDir { root: volume, subdirectory: Vec::new() }));
    }
    // A subPath is a mount of its own: where it leads is told by where both lie in their file system.
    let (all, part) = (path_in_filesystem(&volume)?, path_in_filesystem(source)?);
    let Ok(subdirectory) = part.strip_prefix(&all) else { return Ok(None) };
    // What is mounted somewhere in the volume is none of it, nor is what was removed or renamed meanwhile.
    match stat_components(&volume, subdirectory, id_mappings) {
        Ok((subdirectory, end)) if end == device_and_inode(source)? => {
            Ok(Some(DiskEmptyDir { root: volume, subdirectory }))
        }
        Ok(_) => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether `path` is a `subPath` of some volume, which the kubelet mounts anew for each container that asks for it
/// (Kubernetes, pkg/volume/util/subpath/subpath_linux.go, `doBindSubPath`).
pub fn is_sub_path(path: &Path) -> bool {
    is_third_ancestor(path, "volume-subpaths")
}

/// Whether the third directory above `path` has this name.
fn is_third_ancestor(path: &Path, name: &str) -> bool {
    path.ancestors().nth(3).and_then(Path::file_name).is_some_and(|found| found == name)
}

fn device_and_inode(file: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Name and directory of the emptyDir that `path` is, is below of, or is a subPath of
/// (`<pod>/volumes/kubernetes.io~empty-dir/<name>`, `<pod>/volume-subpaths/<name>/<container>/<number>`).
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

/// The path of a file from its file system's root, without the first `/`, by the mount it was reached by
/// (proc_pid_mountinfo(5)).
///
/// # Errors
/// What the kernel says; that there is no such mount.
pub fn path_in_filesystem(source: &OwnedFd) -> io::Result<PathBuf> {
    let id = mount_api::mount_id(source.as_fd())?;
    let path = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
    let mount = mountinfo::read()?.into_iter().find(|mount| mount.id == id).ok_or(io::ErrorKind::NotFound)?;
    let subdirectory = path.strip_prefix(mount.point).map_err(io::Error::other)?;
    Ok(mount.root.strip_prefix("/").map_err(io::Error::other)?.join(subdirectory))
}

/// What the components of a path below a volume are like on the host, and device and inode of the last. A guest may write
/// to the volume meanwhile: links are not followed.
///
/// # Errors
/// When one is not there, or is not called by a name.
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

/// Who owns a file for the guest: `users` maps ids where its mount does.
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
    fn what_the_kubelet_makes_for_a_pod() {
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
    fn parts_of_an_empty_dir() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path().join("uid/volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "x").unwrap();
        let at =
            |path: &Path, pod| disk_empty_dir(&mount_api::open_path(path, true).unwrap(), path, None, pod).unwrap();
        let of = |path: &Path| {
            let found = at(path, "uid");
            found.map(|found| found.subdirectory.into_iter().map(|part| part.name).collect::<Vec<_>>().join("/"))
        };
        assert_eq!(of(&root).unwrap(), "");
        assert_eq!(of(&root.join("a/b")).unwrap(), "a/b");
        assert_eq!(of(&root.join("a/file")).unwrap(), "a/file");
        assert!(of(dir.path()).is_none() && at(&root, "another").is_none());
        // What a link in it leads to is not in it.
        std::os::unix::fs::symlink("/etc", root.join("out")).unwrap();
        assert_eq!(of(&root.join("out")), None);
    }

    #[test]
    fn sub_paths_are_told_by_where_they_lie() {
        assert!(is_sub_path(Path::new("/var/lib/kubelet/pods/u/volume-subpaths/data/web/0")));
        assert!(!is_sub_path(Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/data/mount")));
    }
}
