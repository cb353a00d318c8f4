//! Faults of file systems of the node that containers have as volumes: frozen, full, read-only.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Armed, Hold};
use crate::chaos::plan::Fault;
use crate::disk::{self, Disk, Mounted};
use crate::node;

/// Directory of the file systems. It is on the node's disk, because the disk's file needs fallocated blocks.
const DIR: &str = "/var/husk-chaos";

/// The file systems: an ext4 file system on a loop device, and a small tmpfs. They exist during a whole shard.
pub struct FileSystems {
    _mounted: Mounted,
    _disk: Disk,
}

impl FileSystems {
    /// Makes and mounts the file systems.
    #[track_caller]
    pub fn mount() -> Self {
        for dir in ["ext4", "tmpfs"] {
            fs::create_dir_all(Path::new(DIR).join(dir)).unwrap();
        }
        let disk = Disk::new(&Path::new(DIR).join("disk"), 32);
        let mounted = disk.format().mount(&path("ext4"), "rw");
        mount(Some("tmpfs"), &path("tmpfs"), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        Self { _mounted: mounted, _disk: disk }
    }

    /// Removes what the victims have written.
    pub fn empty(&self) {
        for dir in ["ext4", "tmpfs"] {
            let _ = fs::remove_file(path(dir).join("data"));
            let _ = fs::remove_file(path(dir).join("fill"));
        }
    }
}

impl Drop for FileSystems {
    fn drop(&mut self) {
        let _ = umount2(&path("tmpfs"), MntFlags::MNT_DETACH);
    }
}

fn path(dir: &str) -> PathBuf {
    Path::new(DIR).join(dir)
}

/// Returns the hostPath of the victim's container, if the fault is one of a file system.
pub fn host_path(fault: Fault) -> Option<String> {
    let dir = match fault {
        Fault::Freeze | Fault::ReadOnly => "ext4",
        Fault::NoSpace => "tmpfs",
        _ => return None,
    };
    Some(path(dir).to_string_lossy().into_owned())
}

/// Injects a fault into a file system.
pub fn arm(fault: Fault) -> Result<Armed, String> {
    match fault {
        Fault::Freeze => {
            let frozen = disk::freeze(&path("ext4")).map_err(|error| format!("failed to freeze: {error}"))?;
            Ok(Armed::new(Hold::Life, move || frozen.thaw().expect("failed to end the freeze")))
        }
        Fault::NoSpace => {
            // The write stops at the limit of 64 KiB.
            let _ = fs::write(path("tmpfs").join("fill"), vec![1; 128 << 10]);
            Ok(Armed::new(Hold::Life, || drop(fs::remove_file(path("tmpfs").join("fill")))))
        }
        Fault::ReadOnly => {
            remount(MsFlags::MS_RDONLY)?;
            Ok(Armed::new(Hold::Life, || remount(MsFlags::empty()).expect("failed to remount read-write")))
        }
        _ => Err(format!("{fault:?} is no fault of a file system")),
    }
}

/// Remounts the ext4 file system. It is busy for a moment whenever a container has its file open.
fn remount(flags: MsFlags) -> Result<(), String> {
    let mut last = Errno::EBUSY;
    let remounted = node::eventually(Duration::from_secs(5), || {
        match mount(None::<&str>, &path("ext4"), None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>) {
            Ok(()) => Some(()),
            Err(error) => {
                last = error;
                None
            }
        }
    });
    remounted.ok_or_else(|| format!("failed to remount: {last}"))
}
