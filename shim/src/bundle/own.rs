//! Volumes that the guest makes of its own, where the kubelet made one of the host's memory: emptyDirs of medium
//! `Memory` and `HugePages` (Kubernetes, pkg/volume/emptydir).
//!
//! What is in them counts as the container's memory then, as it does under runc; shared by virtio-fs it would be the
//! VMM's. Huge pages cannot be shared that way at all. The guest's volume has the size and the owner of the host's and
//! lives as long as the pod.

use super::{kubelet, syscall, users::Users};
use husk_proto::SHARED;
use husk_proto::agent::{VolumeDirectory, VolumeRequest};
use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
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
    let Some((name, root)) = kubelet::empty_dir(path) else {
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
    let (uid, gid) = kubelet::owner(at.uid(), at.gid(), users);
    let kind = if huge { format!("pagesize={HUGE_PAGE}") } else { format!("size={size}") };
    let below = kubelet::within_its_filesystem(source).map_err(look("find it in its volume"))?;
    let volume = syscall::open_path(&root, false).map_err(look("open the volume"))?;
    let directories = kubelet::directories(&volume, &below, users);
    let (directories, _) = directories.map_err(look("stat a directory of the volume"))?;
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

/// What the guest is to do for the part `below` of the volume it has at `whole`, for mount number `mount` of `container`.
pub fn part_of(whole: &str, below: Vec<VolumeDirectory>, (container, mount): (&str, u32)) -> VolumeRequest {
    let name = Path::new(whole).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (fs_type, container_id) = (SHARED.to_owned(), container.to_owned());
    VolumeRequest { name, fs_type, directories: below, container_id, mount, ..Default::default() }
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
