//! Adds the guest's devices to a privileged container, as runc adds the host's devices.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, LinuxNamespaceType};
use nix::sys::stat::{major, minor};

/// Directories below /dev that are separate mounts in a container (as in containerd's `pkg/oci/utils_unix.go`).
const MOUNTS: [&str; 4] = ["pts", "shm", "fd", "mqueue"];
/// Devices that libcontainer creates itself. `ptmx` becomes a symbolic link, and `console` becomes the terminal.
const DEFAULT_DEVICES: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];
/// Maximum depth of searched directories below /dev. No device driver creates deeper directories.
const MAX_DEPTH: usize = 4;

/// Major number of loop devices (Documentation/admin-guide/devices.txt).
const LOOP_MAJOR: i64 = 7;
/// Number of loop devices that a privileged container has, as on a host with the default CONFIG_BLK_DEV_LOOP_MIN_COUNT.
const LOOP_DEVICES: i64 = 8;

/// Adds all present devices of the guest that the specification does not name, and loop devices.
///
/// The guest's kernel creates a loop device only when a process opens or requests the device. The agent cannot add a
/// device to a running container. Therefore this function also adds loop devices that do not exist yet.
pub fn add_all(linux: &mut Linux) -> io::Result<()> {
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut found = Vec::new();
    collect(Path::new("/dev"), MAX_DEPTH, &mut found)?;
    if !has_user_namespace(linux) {
        for number in 0..LOOP_DEVICES {
            let path = PathBuf::from(format!("/dev/loop{number}"));
            if !found.iter().any(|device| *device.path() == path) {
                found.push(loop_device(path, number)?);
            }
        }
    }
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

/// Returns whether the container has a user namespace. In a user namespace, libcontainer cannot create devices, and can
/// only bind-mount the guest's present devices.
fn has_user_namespace(linux: &Linux) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

fn loop_device(path: PathBuf, number: i64) -> io::Result<LinuxDevice> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(LinuxDeviceType::B)
        .major(LOOP_MAJOR)
        .minor(number)
        .file_mode(0o660u32)
        .uid(0u32)
        .gid(0u32)
        .build()
        .map_err(io::Error::other)
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
    use libcontainer::oci_spec::runtime::LinuxNamespace;

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

    #[test]
    fn add_all_adds_each_loop_device_once_unless_there_is_a_user_namespace() {
        let loops = |linux: &Linux| {
            let devices = linux.devices().iter().flatten();
            let loops = devices.filter(|device| device.typ() == LinuxDeviceType::B && device.major() == LOOP_MAJOR);
            loops.filter(|device| device.minor() == 7).count()
        };
        let mut linux = Linux::default();
        add_all(&mut linux).unwrap();
        add_all(&mut linux).unwrap();
        assert_eq!(loops(&linux), 1);
        let mut linux = Linux::default();
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(LinuxNamespaceType::User);
        linux.set_namespaces(Some(vec![namespace]));
        add_all(&mut linux).unwrap();
        assert_eq!(loops(&linux), usize::from(Path::new("/dev/loop7").exists()));
    }
}
