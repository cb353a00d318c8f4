//! The guest's own mounts, and the move of the root off the initial rootfs.

use std::path::Path;

use husk_proto::{GUEST_SHARE, SHARE_TAG};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

/// Why the guest's file systems could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A directory for a mount could not be made.
    #[error("cannot create {path}")]
    Create {
        /// The directory.
        path: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A mount failed.
    #[error("cannot mount {fs} at {path}")]
    Mount {
        /// File system type.
        fs: String,
        /// Mount point.
        path: String,
        /// What the kernel said.
        #[source]
        source: nix::Error,
    },
    /// The root could not be moved.
    #[error("cannot move the root off the initial file system: {step}")]
    Root {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: nix::Error,
    },
}

const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Puts a bind of `/` over `/` and enters it.
///
/// A pivot_root(2) fails while the current root is the kernel's initial rootfs, which has no parent mount; a bind of
/// it has one, costs no memory and keeps every file where it was.
///
/// # Errors
/// [`MountError::Root`] with the step that failed.
pub fn leave_rootfs() -> Result<(), MountError> {
    let step = |step| move |source| MountError::Root { step, source };
    make_dir("/mnt")?;
    mount(Some("/"), "/mnt", None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(step("bind"))?;
    chdir("/mnt").map_err(step("chdir"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("move"))?;
    chroot(".").map_err(step("chroot"))?;
    chdir("/").map_err(step("chdir"))
}

/// Mounts what the agent and every container stand on.
///
/// # Errors
/// [`MountError`] naming the mount that failed.
pub fn mount_all() -> Result<(), MountError> {
    fixed("devtmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0755")?;
    fixed("proc", "/proc", RESTRICTED, "")?;
    fixed("sysfs", "/sys", RESTRICTED, "")?;
    fixed("cgroup2", "/sys/fs/cgroup", RESTRICTED, "nsdelegate,memory_recursiveprot")?;
    fixed("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    fixed("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    fixed("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666")?;
    fixed("tmpfs", "/dev/shm", RESTRICTED, "mode=1777")?;
    fixed("mqueue", "/dev/mqueue", RESTRICTED, "")
}

/// Mounts the directory that the host shares.
///
/// # Errors
/// [`MountError`] when there is no such device or the mount fails.
pub fn mount_share() -> Result<(), MountError> {
    make_dir("/run/husk")?;
    make_dir(GUEST_SHARE)?;
    // Device nodes on it work, as in a container's root under runc; which may be opened is the device programs' to say.
    mount(Some(SHARE_TAG), GUEST_SHARE, Some("virtiofs"), MsFlags::empty(), None::<&str>)
        .map_err(|source| MountError::Mount { fs: "virtiofs".into(), path: GUEST_SHARE.into(), source })
}

/// Makes `path` and its parents.
///
/// # Errors
/// [`MountError::Create`].
pub fn make_dir(path: impl AsRef<Path>) -> Result<(), MountError> {
    let path = path.as_ref();
    std::fs::create_dir_all(path).map_err(|source| MountError::Create { path: path.display().to_string(), source })
}

fn fixed(fs: &str, path: &str, flags: MsFlags, data: &str) -> Result<(), MountError> {
    make_dir(path)?;
    mount(Some(fs), path, Some(fs), flags, Some(data)).map_err(|source| MountError::Mount {
        fs: fs.into(),
        path: path.into(),
        source,
    })
}
