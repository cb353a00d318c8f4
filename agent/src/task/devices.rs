//! The guest's own devices, for a privileged container: what runc gives one of the host's.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};
use nix::sys::stat::{major, minor};

/// Directories below /dev that are mounts of the container's own (as containerd's `pkg/oci/utils_unix.go` has them).
const MOUNTS: [&str; 4] = ["pts", "shm", "fd", "mqueue"];
/// What libcontainer makes by itself, or, the last two, makes a link or the terminal of.
const MADE: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];
/// Deeper than any device driver makes directories.
const DEPTH: usize = 4;

/// Adds all devices that the guest has now and the specification does not name.
pub fn add_all(linux: &mut Linux) -> io::Result<()> {
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut found = Vec::new();
    collect(Path::new("/dev"), DEPTH, &mut found)?;
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
        if !MADE.iter().any(|made| name == *made) {
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
    fn what_is_named_stays_and_what_libcontainer_makes_is_left_to_it() {
        let mut linux = Linux::default();
        linux.set_devices(None);
        add_all(&mut linux).unwrap();
        let first = linux.devices().clone().unwrap();
        assert!(first.iter().all(|device| device.path() != Path::new("/dev/null")), "{first:?}");
        add_all(&mut linux).unwrap();
        assert_eq!(linux.devices().as_ref().map(Vec::len), Some(first.len()));
    }
}
