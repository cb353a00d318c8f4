//! Where the guest has the volumes that it is asked for.

use crate::agent::VolumeRequest;
use crate::{GUEST_SHARE, GUEST_SUBPATHS, GUEST_VOLUMES, SHARED, SHARED_VOLUMES};
use std::path::{Path, PathBuf};

/// Where the volume is, as a whole.
pub fn root(request: &VolumeRequest) -> PathBuf {
    match request.fs_type == SHARED {
        true => shared(&request.name),
        false => Path::new(GUEST_VOLUMES).join(&request.name),
    }
}

/// Where the container has what it is to have of it: all, or a part that is bound there.
pub fn path(request: &VolumeRequest) -> PathBuf {
    if request.directories.is_empty() {
        return root(request);
    }
    let of = if request.fs_type == SHARED { format!("@{}", request.name) } else { String::new() };
    Path::new(GUEST_SUBPATHS).join(&request.container_id).join(format!("{}{of}", request.mount))
}

/// The shared volume that `path` leads to or into, if it is one.
pub fn shared_of(path: &Path) -> Option<PathBuf> {
    if path.starts_with(GUEST_SHARE) {
        return Some(path.to_owned());
    }
    let name = path.strip_prefix(GUEST_SUBPATHS).ok()?.file_name()?.to_str()?;
    Some(shared(name.split_once('@')?.1))
}

fn shared(name: &str) -> PathBuf {
    Path::new(GUEST_SHARE).join(SHARED_VOLUMES).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::VolumeDirectory;

    #[test]
    fn a_part_tells_what_it_is_of() {
        let request = |fs_type: &str, parts: &[&str]| VolumeRequest {
            name: "3.fe-1-2".into(),
            fs_type: fs_type.into(),
            directories: parts
                .iter()
                .map(|name| VolumeDirectory { name: (*name).into(), ..Default::default() })
                .collect(),
            container_id: "c".into(),
            mount: 7,
            ..Default::default()
        };
        let whole = path(&request(SHARED, &[]));
        assert_eq!(whole, Path::new("/run/husk/share/.volumes/3.fe-1-2"));
        let part = path(&request(SHARED, &["sub"]));
        assert_eq!(part, Path::new("/run/husk/subpaths/c/7@3.fe-1-2"));
        assert_eq!((shared_of(&part), shared_of(&whole)), (Some(whole.clone()), Some(whole)));
        assert_eq!(shared_of(&path(&request("tmpfs", &["sub"]))), None);
        assert_eq!(path(&request("tmpfs", &[])), Path::new("/run/husk/volumes/3.fe-1-2"));
        assert_eq!(shared_of(Path::new("/run/husk/shm")), None);
    }
}
