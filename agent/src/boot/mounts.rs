//! Mounts the guest's file systems and moves the root away from the kernel's initial rootfs.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

/// Reason why the agent failed to set up the guest's file systems.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Failed to create a mount point.
    #[error("failed to create directory {path}")]
    Create {
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// Failed to mount a file system.
    #[error("failed to mount {fs} at {path}")]
    Mount {
        /// File system type.
        fs: String,
        /// Mount point.
        path: String,
        #[source]
        source: nix::Error,
    },
    /// Failed to move the root directory.
    #[error("failed to move the root away from the initial rootfs, at step {step}")]
    Root {
        /// Step that failed.
        step: &'static str,
        #[source]
        source: nix::Error,
    },
}

const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Bind-mounts `/` over itself and makes the new mount the root.
///
/// libcontainer calls pivot_root(2) for each container. The call fails while the current root is the kernel's initial
/// rootfs, which has no parent mount. A bind mount of the initial rootfs has a parent mount, takes no memory and keeps
/// all paths.
pub fn leave_rootfs() -> Result<(), MountError> {
    let step = |step| move |source| MountError::Root { step, source };
    make_dir("/mnt")?;
    mount(Some("/"), "/mnt", None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(step("bind"))?;
    chdir("/mnt").map_err(step("chdir"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("move"))?;
    chroot(".").map_err(step("chroot"))?;
    chdir("/").map_err(step("chdir"))
}

/// Mounts the file systems that the agent and all containers need.
pub fn mount_all() -> Result<(), MountError> {
    mount_new("devtmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0755")?;
    mount_new("proc", "/proc", RESTRICTED, "")?;
    mount_new("sysfs", "/sys", RESTRICTED, "")?;
    mount_new("cgroup2", "/sys/fs/cgroup", RESTRICTED, "nsdelegate,memory_recursiveprot")?;
    mount_new("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    mount_new("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    mount_new("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666")?;
    mount_new("tmpfs", "/dev/shm", RESTRICTED, "mode=1777")?;
    mount_new("mqueue", "/dev/mqueue", RESTRICTED, "")
}

/// Creates `path` and its parents.
fn make_dir(path: impl AsRef<Path>) -> Result<(), MountError> {
    let path = path.as_ref();
    std::fs::create_dir_all(path).map_err(|source| MountError::Create { path: path.display().to_string(), source })
}

fn mount_new(fs: &str, path: &str, flags: MsFlags, data: &str) -> Result<(), MountError> {
    make_dir(path)?;
    mount(Some(fs), path, Some(fs), flags, Some(data)).map_err(|source| MountError::Mount {
        fs: fs.into(),
        path: path.into(),
        source,
    })
}
