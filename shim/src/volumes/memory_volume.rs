//! Memory volumes: emptyDirs of medium `Memory` and `HugePages` (Kubernetes, pkg/volume/emptydir).
//!
//! For each memory volume, the agent creates a file system with the size and owner of the kubelet's volume. This file
//! system exists as long as the pod. As under runc, its contents count as the container's memory. If virtio-fs shared
//! the kubelet's volume, the contents would count as the VMM's memory. virtio-fs cannot share huge pages at all.

use std::{io, os::fd::OwnedFd, path::Path};

use husk_proto::SHARED_FS_TYPE;
use husk_proto::agent::{MountVolumeRequest, VolumeDirectory};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use crate::host_view::HostView;
use crate::oci::id_mappings::IdMappings;
use crate::volumes::kubelet_paths;

/// Size of the guest's huge pages in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Error of [`request_for`].
#[derive(Debug, thiserror::Error)]
pub enum MemoryVolumeError {
    /// The volume cannot be inspected.
    #[error("failed to {0}")]
    Inspect(&'static str, #[source] io::Error),
    /// The source has huge pages, but is not in an emptyDir.
    #[error("huge pages of the host cannot be shared with a VM; use an emptyDir of medium HugePages-2Mi")]
    Shared,
    /// The huge pages of the volume have an unsupported size.
    #[error("huge pages of {0} bytes are not supported; use huge pages of 2 MiB (medium HugePages-2Mi)")]
    Size(u64),
}

/// Returns the request that tells the agent to create the memory volume that contains `source`. Returns `None` if
/// `source` is not in a memory volume.
///
/// `source` must have been opened at `path`. `mount` is the mount's index in the specification of `container`.
///
/// # Errors
/// [`MemoryVolumeError`].
pub fn request_for(
    source: &OwnedFd,
    path: &Path,
    id_mappings: Option<&IdMappings>,
    (container, mount): (&str, u32),
    host: &HostView,
) -> Result<Option<MountVolumeRequest>, MemoryVolumeError> {
    let inspect = |what| move |error| MemoryVolumeError::Inspect(what, error);
    let fs_stat = fstatfs(source).map_err(|errno| inspect("stat the file system")(errno.into()))?;
    let block_size = fs_stat.block_size().unsigned_abs();
    let (fs_type, size) = match fs_stat.filesystem_type() {
        TMPFS_MAGIC => ("tmpfs", fs_stat.blocks().saturating_mul(block_size)),
        HUGETLBFS_MAGIC => ("hugetlbfs", 0),
        _ => return Ok(None),
    };
    let huge = fs_type == "hugetlbfs";
    let Some((name, root)) = kubelet_paths::parse_empty_dir(path) else {
        return if huge { Err(MemoryVolumeError::Shared) } else { Ok(None) };
    };
    // If `source` is on a different file system than the volume's root, `source` is not part of the volume.
    let volume = match host.open(&root, false) {
        // `source` is a subPath of a volume that is not an emptyDir, for example of a CSI volume on a tmpfs.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !huge => return Ok(None),
        volume => volume.map_err(inspect("open the volume"))?,
    };
    let volume_stat = fstat(&volume).map_err(|errno| inspect("stat the volume")(errno.into()))?;
    let dir_stat = fstat(source).map_err(|errno| inspect("stat the directory")(errno.into()))?;
    let found = match volume_stat.st_dev == dir_stat.st_dev {
        true => kubelet_paths::path_from_volume(&volume, source, id_mappings, host)
            .map_err(inspect("determine the path of the directory in its volume"))?,
        false => None,
    };
    // A memory volume has a file system of its own. An emptyDir of the default medium is only a directory of the
    // kubelet's file system, which can be a tmpfs, too.
    let Some((_, directories)) = found.filter(|(root, _)| root.as_os_str().is_empty()) else {
        return if huge { Err(MemoryVolumeError::Shared) } else { Ok(None) };
    };
    if huge && block_size != HUGE_PAGE {
        return Err(MemoryVolumeError::Size(block_size));
    }
    let (uid, gid) = kubelet_paths::owner(volume_stat.st_uid, volume_stat.st_gid, id_mappings);
    let kind = if huge { format!("pagesize={HUGE_PAGE}") } else { format!("size={size}") };
    Ok(Some(MountVolumeRequest {
        name: format!("{name}-{:x}", volume_stat.st_dev),
        fs_type: fs_type.to_owned(),
        options: format!("{kind},mode={:o},uid={uid},gid={gid}", volume_stat.st_mode & 0o7777),
        directories,
        container_id: container.to_owned(),
        mount,
        ..Default::default()
    }))
}

/// Returns the request that tells the agent to bind-mount a subdirectory of the volume `name` in the share. `mount` is
/// the mount's index in the specification of `container`.
pub fn subdirectory_request(
    name: String,
    subdirectory: Vec<VolumeDirectory>,
    (container, mount): (&str, u32),
) -> MountVolumeRequest {
    let (fs_type, container_id) = (SHARED_FS_TYPE.to_owned(), container.to_owned());
    MountVolumeRequest { name, fs_type, directories: subdirectory, container_id, mount, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_on_disk_is_not_a_memory_volume() {
        let dir = tempfile::tempdir().unwrap();
        let request_at = |path: &Path| {
            let host = HostView::own();
            request_for(&host.open(path, true).unwrap(), path, None, ("c", 0), &host).unwrap()
        };
        assert_eq!(request_at(dir.path()), None);
        // /dev/shm is a tmpfs, but not an emptyDir.
        assert_eq!(request_at(Path::new("/dev/shm")), None);
    }
}
