//! Adds the guest's devices to a privileged container, as runc adds the host's devices.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};
use nix::sys::stat::{major, minor};

/// Directories below /dev that are separate mounts in a container (as in containerd's `pkg/oci/utils_unix.go`).
const MOUNTS: [&str; 4] = ["pts", "shm", "fd", "mqueue"];
/// Devices that libcontainer creates itself. `ptmx` becomes a symbolic link, and `console` becomes the terminal.
const DEFAULT_DEVICES: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];
/// Maximum depth of searched directories below /dev. No device driver creates deeper directories.
const MAX_DEPTH: usize = 4;

/// Adds all present devices of the guest that the specification does not name.
pub fn add_all(linux: &mut Linux) -> io::Result<()> {
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut found = Vec::new();
    collect(Path::new("/dev"), MAX_DEPTH, &mut found)?;
    found.retain(|device| !devices.iter().any(|named| named.path() == device.path()));
    devices.append(&mut found);
    linux.set_devices(Some(devices));
    Ok(())
}

fn collect(dir: &Path, depth: usize, found: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let kind = match entry.file_type()? {
            kind if kind.is_dir() => {
                if depth > 0 && !MOUNTS.iter().any(|mount| name == *mount) {
                    collect(&entry.path(), depth - 1, found)?;
                }
                continue;
            }
            kind if kind.is_char_device() => LinuxDeviceType::C,
            kind if kind.is_block_device() => LinuxDeviceType::B,
            _ => continue,
        };
        if !DEFAULT_DEVICES.iter().any(|default| name == *default) {
            found.push(device(entry.path(), kind, &entry.metadata()?)?);
        }
    }
    Ok(())
}

fn device(path: PathBuf, kind: LinuxDeviceType, metadata: &std::fs::Metadata) -> io::Result<LinuxDevice> {
    let number = |number: u64| i64::try_from(number).map_err(io::Error::other);
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(kind)
        .major(number(major(metadata.rdev()))?)
        .minor(number(minor(metadata.rdev()))?)
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn add_all_skips_named_and_default_devices() {
        let mut linux = Linux::default();
        linux.set_devices(None);
        add_all(&mut linux).unwrap();
        let first = linux.devices().clone().unwrap();
        assert!(first.iter().all(|device| device.path() != Path::new("/dev/null")), "{first:?}");
        add_all(&mut linux).unwrap();
        assert_eq!(linux.devices().as_ref().map(Vec::len), Some(first.len()));
    }
}
