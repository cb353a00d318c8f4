//! Guest paths of requested volumes.

use std::path::{Path, PathBuf};

use crate::agent::MountVolumeRequest;
use crate::{GUEST_SHARE, GUEST_SUBPATHS, GUEST_VOLUMES, SHARED_FS_TYPE, SHARED_VOLUMES};

/// Returns the path of the volume's root directory.
pub fn root_path(request: &MountVolumeRequest) -> PathBuf {
    match request.fs_type == SHARED_FS_TYPE {
        true => shared_path(&request.name),
        false => Path::new(GUEST_VOLUMES).join(&request.name),
    }
}

/// Returns the path that the container mounts: the volume's root, or the bind mount of one of its directories.
pub fn guest_path(request: &MountVolumeRequest) -> PathBuf {
    if request.directories.is_empty() {
        return root_path(request);
    }
    let volume = if request.fs_type == SHARED_FS_TYPE { format!("@{}", request.name) } else { String::new() };
    Path::new(GUEST_SUBPATHS).join(&request.container_id).join(format!("{}{volume}", request.mount))
}

/// Returns the root of the shared volume to which `path` belongs. `path` must be a result of [`guest_path`].
///
/// Returns `None` if the volume is not shared. If `path` is a bind mount of a directory in a shared volume, returns
/// that volume's root. If `path` is the root itself, returns `path`.
pub fn shared_volume_of(path: &Path) -> Option<PathBuf> {
    if path.starts_with(GUEST_SHARE) {
        return Some(path.to_owned());
    }
    let name = path.strip_prefix(GUEST_SUBPATHS).ok()?.file_name()?.to_str()?;
    Some(shared_path(name.split_once('@')?.1))
}

fn shared_path(name: &str) -> PathBuf {
    Path::new(GUEST_SHARE).join(SHARED_VOLUMES).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::VolumeDirectory;

    #[test]
    fn shared_volume_of_returns_the_volume_of_a_subpath() {
        let request = |fs_type: &str, directories: &[&str]| MountVolumeRequest {
            name: "3.fe-1-2".into(),
            fs_type: fs_type.into(),
            directories: directories
                .iter()
                .map(|name| VolumeDirectory { name: (*name).into(), ..Default::default() })
                .collect(),
            container_id: "c".into(),
            mount: 7,
            ..Default::default()
        };
        let root = guest_path(&request(SHARED_FS_TYPE, &[]));
        assert_eq!(root, Path::new("/run/husk/share/.volumes/3.fe-1-2"));
        let subpath = guest_path(&request(SHARED_FS_TYPE, &["sub"]));
        assert_eq!(subpath, Path::new("/run/husk/subpaths/c/7@3.fe-1-2"));
        assert_eq!((shared_volume_of(&subpath), shared_volume_of(&root)), (Some(root.clone()), Some(root)));
        assert_eq!(shared_volume_of(&guest_path(&request("tmpfs", &["sub"]))), None);
        assert_eq!(guest_path(&request("tmpfs", &[])), Path::new("/run/husk/volumes/3.fe-1-2"));
        assert_eq!(shared_volume_of(Path::new("/run/husk/shm")), None);
    }
}
