//! Makes settings of the host's kernel read-only in the shim's mount namespace: sysfs, `/proc/sys` and others that the
//! shim does not write.
//!
//! The read-only mounts protect against defects in the handling of paths. They do not stop an attacker who executes
//! code in the shim, because the shim keeps CAP_SYS_ADMIN, with which the attacker can change mounts.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::fs_types;
use crate::volumes::mount_api::{MOUNT_ATTR_RDONLY, attach, clone_tree, mount_id, open_path, set_attributes};
use crate::volumes::mountinfo::{self, Entry};

/// Mount point of procfs.
const PROC: &str = "/proc";
/// Files and directories of procfs that change the host's kernel. The rest of procfs stays writable, because the shim
/// writes `oom_score_adj` and user id maps.
const PROC_KERNEL: [&str; 10] =
    ["acpi", "bus", "dynamic_debug", "fs", "irq", "latency_stats", "mtrr", "scsi", "sys", "sysrq-trigger"];
/// Beginnings of the types of file systems whose access can hang or fail, because another program or another node serves
/// them.
const REMOTE: [&str; 9] = ["9p", "afs", "beegfs", "ceph", "cifs", "fuse", "lustre", "nfs", "smb"];

/// A failure to make a mount read-only.
#[derive(Debug, thiserror::Error)]
#[error("failed to make {} read-only in the shim's mount namespace", path.display())]
pub struct MountError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Makes the mounts through which the shim could change the host's kernel read-only in this mount namespace. Mounts
/// that the host adds later keep their flags.
pub fn protect() -> Result<(), MountError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| MountError { path, source }
    };
    let read = || mountinfo::read().map_err(error(Path::new("/proc/thread-self/mountinfo")));
    let mounts = read()?;
    for mount in mounts.iter().filter(|mount| is_kernel_interface(mount)) {
        if is_below_remote(mount, &mounts) {
            // The path leads through a file system that can hang. A program that has mounted the interface there can
            // use it without Husk.
            tracing::debug!("{} stays writable, because it is below a remote file system", mount.point.display());
            continue;
        }
        let Err(source) = make_read_only(mount) else { continue };
        // The host may have unmounted the mount in the meantime.
        if read()?.iter().any(|now| now.id == mount.id) {
            return Err(error(&mount.point)(source));
        }
    }
    for name in PROC_KERNEL {
        let path = Path::new(PROC).join(name);
        cover(&path).map_err(error(&path))?;
    }
    Ok(())
}

fn is_kernel_interface(mount: &Entry) -> bool {
    fs_types::is_protected_type(&mount.kind) && !(mount.kind == "proc" && mount.point == Path::new(PROC))
}

/// Returns whether the path of a mount leads through a remote file system.
fn is_below_remote(mount: &Entry, mounts: &[Entry]) -> bool {
    // If the root is remote, nothing of the node works while the root hangs.
    let is_remote =
        |other: &&Entry| other.point != Path::new("/") && REMOTE.iter().any(|kind| other.kind.starts_with(kind));
    mounts.iter().filter(is_remote).any(|other| mount.point != other.point && mount.point.starts_with(&other.point))
}

fn make_read_only(mount: &Entry) -> io::Result<()> {
    let root = match open_path(&mount.point, false) {
        Ok(root) => root,
        // Another mount hides the mount point.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // If another mount covers this mount, the path leads to the other mount.
    if mount_id(root.as_fd())? != mount.id {
        return Ok(());
    }
    set_attributes(root.as_fd(), MOUNT_ATTR_RDONLY, 0, false)
}

/// Covers a file or directory by a read-only mount of itself.
fn cover(path: &Path) -> io::Result<()> {
    let original = match open_path(path, false) {
        Ok(original) => original,
        // Whether the file exists depends on the kernel's configuration.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let copy = clone_tree(original.as_fd(), false)?;
    set_attributes(copy.as_fd(), MOUNT_ATTR_RDONLY, 0, false)?;
    attach(copy.as_fd(), original.as_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;
    use crate::volumes::test_support::isolated;

    #[test]
    fn is_below_remote_looks_at_the_mounts_on_the_path() {
        let entry = |point: &str, kind: &str| Entry {
            id: 1,
            parent: 1,
            device: 1,
            root: "/".into(),
            point: point.into(),
            kind: kind.into(),
            id_mapped: false,
        };
        let mounts = [entry("/", "nfs"), entry("/home", "nfs4"), entry("/mnt/a", "fuse.sshfs")];
        for (point, below) in [
            ("/home/chroot/proc", true),
            ("/mnt/a/sys", true),
            ("/mnt/ab/sys", false),
            ("/home2/proc", false),
            ("/sys", false),
        ] {
            assert_eq!(is_below_remote(&entry(point, "proc"), &mounts), below, "{point}");
        }
    }

    fn opens_for_writing(path: &str) -> Result<(), Option<i32>> {
        OpenOptions::new().write(true).open(path).map(drop).map_err(|error| error.raw_os_error())
    }

    #[test]
    fn protect_leaves_only_the_needed_files_of_procfs_and_sysfs_writable() {
        isolated(|_| {
            let read_only = Err(Some(libc::EROFS));
            assert_eq!(opens_for_writing("/proc/sys/kernel/core_pattern"), Ok(()));
            protect().unwrap();
            for path in ["/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward"] {
                assert_eq!(opens_for_writing(path), read_only, "{path} is not read-only");
            }
            for path in [
                "/proc/sysrq-trigger",
                "/sys/kernel/uevent_helper",
                "/sys/power/state",
                "/sys/module/kernel/parameters/panic",
            ] {
                let result = opens_for_writing(path);
                assert!(
                    result == read_only || result == Err(Some(libc::ENOENT)),
                    "{path} exists, but is not read-only: {result:?}"
                );
            }
            assert_eq!(opens_for_writing("/proc/self/oom_score_adj"), Ok(()));
            assert!(fs::read_to_string("/proc/sys/kernel/hostname").is_ok());
        });
    }
}
