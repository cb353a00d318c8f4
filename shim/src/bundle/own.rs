//! Volumes that the guest makes of its own, where the kubelet made one of the host's memory: emptyDirs of medium
//! `Memory` and `HugePages` (Kubernetes, pkg/volume/emptydir).
//!
//! What is in them counts as the container's memory then, as it does under runc; shared by virtio-fs it would be the
//! VMM's. Huge pages cannot be shared that way at all. The guest's volume has the size and the owner of the host's and
//! lives as long as the pod.

use super::{syscall, users::Users};
use husk_proto::agent::{VolumeDirectory, VolumeRequest};
use husk_proto::{GUEST_SUBPATHS, GUEST_VOLUMES};
use std::{
    fs::{self, Metadata},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
};

/// linux/magic.h
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// The pages there are, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Why there is no such volume.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// It cannot be looked at.
    #[error("cannot {0}")]
    Look(&'static str, #[source] io::Error),
    /// Somebody else's huge pages.
    #[error("huge pages of the host cannot be shared with a virtual machine; use an emptyDir of medium HugePages-2Mi")]
    Shared,
    /// Huge pages of another size.
    #[error("huge pages of {0} bytes: a virtual machine has those of 2 MiB only (medium HugePages-2Mi)")]
    Size(u64),
}

/// What the guest is to make of the directory `source`, found at `path`, for mount number `mount` of `container`; none
/// where it is shared as others are.
///
/// # Errors
/// [`OwnError`].
pub fn find(
    source: &OwnedFd,
    path: &Path,
    users: Option<&Users>,
    (container, mount): (&str, u32),
) -> Result<Option<VolumeRequest>, OwnError> {
    let look = |what| move |error| OwnError::Look(what, error);
    let system = filesystem(source).map_err(look("stat its file system"))?;
    let (fs_type, size) = match system.f_type {
        TMPFS_MAGIC => ("tmpfs", system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs())),
        HUGETLBFS_MAGIC => ("hugetlbfs", 0),
        _ => return Ok(None),
    };
    let huge = fs_type == "hugetlbfs";
    let Some((name, root)) = kubelets(path) else {
        return if huge { Err(OwnError::Shared) } else { Ok(None) };
    };
    // A directory that lies on another file system than its volume is none of it.
    let at = fs::symlink_metadata(&root).map_err(look("stat the volume"))?;
    let here = fs::metadata(format!("/proc/self/fd/{}", source.as_raw_fd())).map_err(look("stat the directory"))?;
    if at.dev() != here.dev() {
        return if huge { Err(OwnError::Shared) } else { Ok(None) };
    }
    if huge && system.f_bsize.unsigned_abs() != HUGE_PAGE {
        return Err(OwnError::Size(system.f_bsize.unsigned_abs()));
    }
    let (uid, gid) = owner(&at, users);
    let kind = if huge { format!("pagesize={HUGE_PAGE}") } else { format!("size={size}") };
    let below = within_volume(source).map_err(look("find it in its volume"))?;
    let directories = directories(&root, &below, users).map_err(look("stat a directory of the volume"))?;
    Ok(Some(VolumeRequest {
        name: format!("{name}-{:x}", at.dev()),
        fs_type: fs_type.to_owned(),
        options: format!("{kind},mode={:o},uid={uid},gid={gid}", at.mode() & 0o7777),
        directories,
        container_id: container.to_owned(),
        mount,
        ..Default::default()
    }))
}

/// Where the guest has it.
pub fn guest_path(request: &VolumeRequest) -> String {
    match request.directories.is_empty() {
        true => format!("{GUEST_VOLUMES}/{}", request.name),
        false => format!("{GUEST_SUBPATHS}/{}/{}", request.container_id, request.mount),
    }
}

/// Name and directory of the kubelet's emptyDir that `path` is, is below of, or is a subPath of
/// (`<pod>/volumes/kubernetes.io~empty-dir/<name>`, `<pod>/volume-subpaths/<name>/<container>/<number>`).
fn kubelets(path: &Path) -> Option<(String, PathBuf)> {
    let parts: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
    let found = parts.windows(3).enumerate().rev().find_map(|(at, part)| match part {
        ["volumes", "kubernetes.io~empty-dir", name] | ["volume-subpaths", name, _] => Some((at, *name)),
        _ => None,
    });
    let (at, name) = found?;
    let pod: PathBuf = path.components().take(at).collect();
    Some((name.to_owned(), pod.join("volumes/kubernetes.io~empty-dir").join(name)))
}

/// The path of a directory from its file system's root, by the mount it was reached by (proc_pid_mountinfo(5)).
fn within_volume(source: &OwnedFd) -> io::Result<PathBuf> {
    let id = syscall::mount_id(source.as_fd())?.to_string();
    let path = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let of_mount = mounts.lines().find(|line| line.split(' ').next() == Some(&id));
    let (root, point) = of_mount.and_then(root_and_point).ok_or(io::ErrorKind::NotFound)?;
    let below = path.strip_prefix(point).map_err(io::Error::other)?;
    Ok(root.strip_prefix("/").map_err(io::Error::other)?.join(below))
}

fn root_and_point(line: &str) -> Option<(PathBuf, PathBuf)> {
    let mut fields = line.split(' ').skip(3);
    Some((plain(fields.next()?), plain(fields.next()?)))
}

/// A path of mountinfo, in which blanks and backslashes are octal (fs/proc_namespace.c, `mangle`).
fn plain(field: &str) -> PathBuf {
    let mut text = field.to_owned();
    for (code, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(code, character);
    }
    text.into()
}

/// What the components of a path below the volume are like on the host.
fn directories(root: &Path, below: &Path, users: Option<&Users>) -> io::Result<Vec<VolumeDirectory>> {
    let mut path = root.to_owned();
    let mut directories = Vec::new();
    for part in below.components() {
        let Component::Normal(name) = part else { return Err(io::ErrorKind::InvalidInput.into()) };
        path.push(name);
        let meta = fs::symlink_metadata(&path)?;
        let (uid, gid) = owner(&meta, users);
        let name = name.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        directories.push(VolumeDirectory { name, mode: meta.mode() & 0o7777, uid, gid, ..Default::default() });
    }
    Ok(directories)
}

fn owner(meta: &Metadata, users: Option<&Users>) -> (u32, u32) {
    match users {
        Some(users) => users.owner(meta.uid(), meta.gid()),
        None => (meta.uid(), meta.gid()),
    }
}

fn filesystem(file: &OwnedFd) -> io::Result<libc::statfs> {
    // SAFETY: statfs is plain data for which all zeroes is valid.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call, which fills it.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut system) } {
        0 => Ok(system),
        _ => Err(io::Error::last_os_error()),
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
            assert_eq!(kubelets(Path::new(&format!("{pod}/{path}"))), expected, "{path}");
        }
        assert_eq!(kubelets(Path::new(&format!("{pod}/volume-subpaths/cache/web/0"))), expected);
        assert_eq!(kubelets(Path::new(&format!("{pod}/volumes/kubernetes.io~secret/cache"))), None);
        assert_eq!(kubelets(Path::new("/dev/shm")), None);
    }

    #[test]
    fn lines_of_mountinfo() {
        let line = r"36 35 98:0 /sub\040dir /mnt/a\134b rw,noatime master:1 - tmpfs tmpfs rw";
        assert_eq!(root_and_point(line), Some(("/sub dir".into(), r"/mnt/a\b".into())));
        assert_eq!(root_and_point("36 35"), None);
    }

    #[test]
    fn a_directory_on_disk_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &Path| {
            let fd = syscall::open_path(path, true).unwrap();
            find(&fd, path, None, ("c", 0)).unwrap()
        };
        assert_eq!(at(dir.path()), None);
        // In memory, but not the kubelet's.
        assert_eq!(at(Path::new("/dev/shm")), None);
    }
}
