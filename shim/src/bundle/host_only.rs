//! File systems that are the host's alone: interfaces to its kernel, devices and processes, which no guest gets.
//!
//! Under runc a container may look at the node's `/proc` by a volume of `/` because it runs with its own rights there.
//! Here the VMM would open such files for it, with the VMM's rights. What a guest needs of these file systems it has of
//! its own kernel's.

use super::mountinfo::Entry;
use nix::sys::{
    stat::{fstat, stat},
    statfs::{TMPFS_MAGIC, fstatfs, statfs},
};
use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// Types of Linux 6.12 that are interfaces to its kernel, devices or processes, and what statfs(2) gives as `f_type` (include/uapi/linux/magic.h and each file system's source).
/// A devtmpfs is told by its device number: statfs calls it a tmpfs.
const TYPES: [(&str, Option<i64>); 32] = [
    ("binder", Some(0x6c6f_6f70)),
    ("binfmt_misc", Some(0x4249_4e4d)),
    ("bpf", Some(0xcafe_4a11)),
    ("cgroup", Some(0x27_e0eb)),
    ("cgroup2", Some(0x6367_7270)),
    ("configfs", Some(0x6265_6570)),
    ("cpuset", None),
    ("debugfs", Some(0x6462_6720)),
    ("devpts", Some(0x1cd1)),
    ("devtmpfs", None),
    ("efivarfs", Some(0xde5e_81e4)),
    ("functionfs", Some(0xa64_7361)),
    ("fusectl", Some(0x6573_5543)),
    ("gadgetfs", Some(0xaee7_1ee7)),
    ("ibmasmfs", Some(0x6672_6f67)),
    ("ipathfs", Some(0x72_6a77)),
    ("mqueue", Some(0x1980_0202)),
    ("nfsd", Some(0x6e66_7364)),
    ("nsfs", Some(0x6e73_6673)),
    ("ocfs2_dlmfs", Some(0x76a9_f425)),
    ("pidfs", Some(0x5049_4446)),
    ("proc", Some(0x9fa0)),
    ("pstore", Some(0x6165_676c)),
    ("resctrl", Some(0x765_5821)),
    ("rpc_pipefs", Some(0x6759_6969)),
    ("s390_hypfs", Some(0x68_7970)),
    ("securityfs", Some(0x7363_6673)),
    ("selinuxfs", Some(0xf97c_ff8c)),
    ("smackfs", Some(0x4341_5d53)),
    ("sysfs", Some(0x6265_6572)),
    ("tracefs", Some(0x7472_6163)),
    ("xenfs", Some(0xabba_1974)),
];

/// What tells the host's own file systems from others.
#[derive(Debug, Clone)]
pub struct HostOnly {
    /// Device numbers of further ones, each with its name.
    devices: Vec<(u64, &'static str)>,
}

impl HostOnly {
    /// As the host is now. A node that is itself a container has a tmpfs with device nodes at /dev.
    pub fn now() -> Self {
        let own = statfs("/dev").is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC);
        Self { devices: Vec::new() }.and(own.then_some(Path::new("/dev")), "devtmpfs")
    }

    /// As [`HostOnly::now`], and the file systems that these directories are on.
    pub fn and<'a>(mut self, directories: impl IntoIterator<Item = &'a Path>, name: &'static str) -> Self {
        let devices = directories.into_iter().filter_map(|path| Some((stat(path).ok()?.st_dev, name)));
        self.devices.extend(devices);
        self
    }

    fn by_device(&self, device: u64) -> Option<&'static str> {
        self.devices.iter().find(|(own, _)| *own == device).map(|(_, name)| *name)
    }

    /// Whether a mount is of such a file system.
    pub fn has(&self, mount: &Entry) -> bool {
        self.by_device(mount.device).is_some() || TYPES.iter().any(|(kind, _)| *kind == mount.kind)
    }

    /// The type of the file system that `file` is on, if it is such a one.
    ///
    /// # Errors
    /// What fstatfs(2) and fstat(2) say.
    pub fn type_of(&self, file: &OwnedFd) -> io::Result<Option<&'static str>> {
        let magic = fstatfs(file)?.filesystem_type().0;
        match TYPES.iter().find(|(_, of_type)| *of_type == Some(magic)) {
            Some((kind, _)) => Ok(Some(kind)),
            None => Ok(self.by_device(fstat(file)?.st_dev)),
        }
    }
}

/// The guest's path of what the host has at `path` on such a file system: the same, where the guest has one of its own
/// there. Not what is of one process of the host's: a process id means another one in the guest.
pub fn in_the_guest(path: &Path) -> Option<PathBuf> {
    let process = |rest: &Path| {
        let first = rest.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
        first.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let own = match path.strip_prefix("/proc") {
        Ok(rest) => !process(rest),
        Err(_) => path.starts_with("/sys") || path.starts_with("/dev"),
    };
    own.then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{mountinfo, syscall};

    #[test]
    fn the_types_are_told_by_name_number_and_device() {
        let host_only = HostOnly::now();
        let of = |path: &str| host_only.type_of(&syscall::open_path(Path::new(path), true).unwrap()).unwrap();
        assert_eq!(of("/proc"), Some("proc"));
        assert_eq!(of("/proc/self/status"), Some("proc"));
        assert_eq!(of("/proc/self/ns/net"), Some("nsfs"));
        assert_eq!(of("/sys"), Some("sysfs"));
        assert_eq!(of("/dev"), Some("devtmpfs"));
        assert_eq!(of("/"), None);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path().to_str().unwrap()), None);
        // Each of the machine's mounts is told the same way by its entry and by a look at it.
        for entry in mountinfo::read().unwrap() {
            let Ok(file) = syscall::open_path(&entry.point, false) else { continue };
            // Another may cover it.
            if syscall::mount_id(std::os::fd::AsFd::as_fd(&file)).unwrap() == entry.id {
                assert_eq!(host_only.type_of(&file).unwrap().is_some(), host_only.has(&entry), "{entry:?}");
            }
        }
    }

    #[test]
    fn the_guest_has_its_own_but_for_processes() {
        for path in ["/proc", "/proc/sys/vm", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts"] {
            assert_eq!(in_the_guest(Path::new(path)).as_deref(), Some(Path::new(path)));
        }
        for path in ["/proc/1", "/proc/4711/root", "/mnt/proc", "/procfs", "/"] {
            assert_eq!(in_the_guest(Path::new(path)), None, "{path}");
        }
    }
}
