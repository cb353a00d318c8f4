//! Writes the volumes of ConfigMaps and similar objects as the kubelet does (Kubernetes,
//! `pkg/volume/util/atomic_writer.go`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path};

/// A file of a volume: its path in the volume, its content and its permissions.
pub type Entry<'a> = (&'a str, &'a [u8], u32);

/// Replaces the content of `volume` with `entries`. Writes the entries to a new directory `version`. Then atomically
/// replaces the symbolic link `..data` with a link to this directory. The visible names in the volume are links through
/// `..data`.
#[track_caller]
pub fn write_atomically(volume: &Path, version: &str, entries: &[Entry]) {
    fs::create_dir_all(volume).unwrap();
    let old = fs::read_link(volume.join("..data")).ok();
    let new = volume.join(version);
    fs::create_dir(&new).unwrap();
    fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
    let mut visible = BTreeSet::new();
    for (path, content, mode) in entries {
        let file = new.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, content).unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(*mode)).unwrap();
        let Some(Component::Normal(first)) = Path::new(path).components().next() else {
            panic!("invalid path {path:?}")
        };
        visible.insert(first.to_owned());
    }
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    for name in &visible {
        match symlink(Path::new("..data").join(name), volume.join(name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made.unwrap(),
        }
    }
    // Removes the visible names that `entries` no longer contains, and then the directory of the old version.
    let there: Vec<OsString> = fs::read_dir(volume).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    for name in there.iter().filter(|name| !name.to_string_lossy().starts_with("..") && !visible.contains(*name)) {
        fs::remove_file(volume.join(name)).unwrap();
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old)).unwrap();
    }
}
