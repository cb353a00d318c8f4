//! Recognizes host-only file systems, which are interfaces to the host's kernel, devices or processes. The shim never
//! puts these file systems into the share.
//!
//! Under runc, a container that mounts the host's `/proc` opens files with the container's permissions. If `/proc` were
//! in the share, the VMM would open the files with the VMM's permissions. The guest has its own instances of the file
//! systems that containers need.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::sys::{
    stat::{fstat, stat},
    statfs::{TMPFS_MAGIC, fstatfs, statfs},
};

use crate::fs_types;
use crate::host_view::HostView;
use crate::volumes::mountinfo::Entry;
use crate::volumes::{mount_api, mountinfo};

/// Name that error messages use for the sandbox's own file systems.
const SANDBOX: &str = "the sandbox's share";

/// Recognizes host-only file systems.
#[derive(Debug, Clone)]
pub struct HostOnly {
    /// Device numbers and names of host-only file systems whose type does not show this.
    devices: Vec<(u64, &'static str)>,
}

impl HostOnly {
    /// Returns a value that recognizes host-only types ([`fs_types`]), a tmpfs at `/dev`, and the file systems of
    /// `directories`.
    ///
    /// `/dev` is a tmpfs with device nodes if the node is itself a container. `directories` are the sandbox's own
    /// directories, such as the share. The shim treats their file systems as host-only, too. Otherwise, a container
    /// whose volume is the host's `/` could write to the share.
    ///
    /// # Errors
    /// The error of stat(2) or statfs(2).
    pub fn new<'a>(directories: impl IntoIterator<Item = &'a Path>) -> io::Result<Self> {
        let dev = Path::new("/dev");
        let mut devices = Vec::new();
        if statfs(dev)?.filesystem_type() == TMPFS_MAGIC {
            devices.push((stat(dev)?.st_dev, "devtmpfs"));
        }
        for path in directories {
            devices.push((stat(path)?.st_dev, SANDBOX));
        }
        Ok(Self { devices })
    }

    fn by_device(&self, device: u64) -> Option<&'static str> {
        self.devices.iter().find(|(number, _)| *number == device).map(|(_, name)| *name)
    }

    /// Returns whether the file system of `mount` is host-only.
    pub fn contains(&self, mount: &Entry) -> bool {
        self.name_of(mount).is_some()
    }

    /// Returns whether the file system of `mount` is one of the sandbox's own, such as the share.
    pub fn is_of_sandbox(&self, mount: &Entry) -> bool {
        self.is_device_of_sandbox(mount.device)
    }

    /// Returns whether `device` is the device number of one of the sandbox's own file systems.
    pub fn is_device_of_sandbox(&self, device: u64) -> bool {
        self.by_device(device) == Some(SANDBOX)
    }

    fn name_of(&self, mount: &Entry) -> Option<&'static str> {
        fs_types::host_only(&mount.kind).or_else(|| self.by_device(mount.device))
    }

    /// Returns the name of the file system that contains `file`, if this file system is host-only. `file` is a file of
    /// the host.
    ///
    /// Reads the host's mount list only for a tmpfs, because devtmpfs has the same `f_type`. The list can be long.
    ///
    /// # Errors
    /// The error of fstatfs(2) or fstat(2), or the error of reading the mount list.
    pub fn type_of(&self, file: &OwnedFd, host: &HostView) -> io::Result<Option<&'static str>> {
        let magic = fstatfs(file)?.filesystem_type();
        if let Some(kind) = fs_types::by_magic(magic.0) {
            return Ok(Some(kind));
        }
        let by_device = self.by_device(fstat(file)?.st_dev);
        if by_device.is_some() || magic != TMPFS_MAGIC {
            return Ok(by_device);
        }
        let (id, mounts) = (mount_api::mount_id(file.as_fd())?, mountinfo::of_host(host)?);
        Ok(mounts.iter().find(|mount| mount.id == id).and_then(|mount| self.name_of(mount)))
    }
}

/// `/dev` and the directories below `/dev` that exist in every guest.
const GUEST_DEV_DIRS: [&str; 5] = ["/dev", "/dev/mqueue", "/dev/net", "/dev/pts", "/dev/shm"];

/// Returns `path`, a host path on a host-only file system, if every guest has its own file system at this path.
///
/// Returns `None` if a guest may lack the path, for example `/dev/dri`. Also returns `None` for the directory of a
/// process, because the PID identifies a different process in the guest.
pub fn guest_path(path: &Path) -> Option<PathBuf> {
    let in_guest = match path.strip_prefix("/proc") {
        Ok(rest) => !rest.components().next().is_some_and(|first| is_process_dir(first.as_os_str())),
        Err(_) => path.starts_with("/sys") || GUEST_DEV_DIRS.iter().any(|dev| path == Path::new(dev)),
    };
    in_guest.then(|| path.to_owned())
}

/// Returns whether `/proc/NAME` is the directory of a process or thread.
fn is_process_dir(name: &OsStr) -> bool {
    name == "self" || name == "thread-self" || name.as_bytes().iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_of_recognizes_types_by_name_magic_and_device() {
        let host_only = HostOnly::new([]).unwrap();
        let of = |path: &str| {
            host_only.type_of(&mount_api::open_path(Path::new(path), true).unwrap(), &HostView::own()).unwrap()
        };
        assert_eq!(of("/proc"), Some("proc"));
        assert_eq!(of("/proc/self/status"), Some("proc"));
        assert_eq!(of("/proc/self/ns/net"), Some("nsfs"));
        assert_eq!(of("/sys"), Some("sysfs"));
        assert_eq!(of("/dev"), Some("devtmpfs"));
        assert_eq!(of("/"), None);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path().to_str().unwrap()), None);
        // `contains` and `type_of` agree on every mount of the host.
        for entry in mountinfo::read().unwrap() {
            let Ok(file) = mount_api::open_path(&entry.point, false) else { continue };
            // Skip a mount that another mount covers.
            if mount_api::mount_id(std::os::fd::AsFd::as_fd(&file)).unwrap() == entry.id {
                assert_eq!(
                    host_only.type_of(&file, &HostView::own()).unwrap().is_some(),
                    host_only.contains(&entry),
                    "{entry:?}"
                );
            }
        }
    }

    #[test]
    fn guest_path_rejects_process_dirs_and_paths_that_a_guest_may_lack() {
        for path in ["/proc", "/proc/sys/vm", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts", "/dev/net"] {
            assert_eq!(guest_path(Path::new(path)).as_deref(), Some(Path::new(path)));
        }
        for path in ["/proc/1", "/proc/4711/root", "/proc/self/fd", "/dev/dri", "/mnt/proc", "/procfs", "/"] {
            assert_eq!(guest_path(Path::new(path)), None, "{path}");
        }
    }
}
