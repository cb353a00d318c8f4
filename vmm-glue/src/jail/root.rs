//! The mount namespace and the root directory of the VMM process. The root directory is the share. No other file of the
//! host has a path in the namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use husk_base::sys::mount::clone_tree;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, pivot_root};

/// Mount point of the VMM's own procfs and, without a share, of the empty root. After the change of the root directory,
/// the VMM no longer sees this mount point.
const PROC: &str = "/proc";

/// Error from changing the root directory.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {} for the jail of the VMM", path.display())]
pub struct RootError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn error<E: Into<io::Error>>(step: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> RootError {
    let path = path.as_ref().to_owned();
    move |source| RootError { step, path, source: source.into() }
}

/// Makes `share` the root of this process's mount namespace, which must be new. Returns the open `/proc/self/fd`
/// and `/dev/null`, because these paths do not exist under the new root. Without a share the root is an empty,
/// read-only directory.
///
/// Mounts that the host adds to the share later appear in this namespace too, because the root is a slave mount of the
/// share. No mount in this namespace propagates to the host.
pub fn enter(share: Option<&Path>) -> Result<(File, File), RootError> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(error("set slave propagation of", "/"))?;
    let dev_null = File::options().write(true).open("/dev/null").map_err(error("open", "/dev/null"))?;
    // The host's procfs shows all processes of the host. The new instance shows only the processes of the VMM's PID
    // namespace. With `subset=pid` (Linux 5.8), the instance shows neither sysctls nor information about the kernel.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), PROC, Some("proc"), flags, Some("subset=pid")).map_err(error("mount procfs at", PROC))?;
    // The clone is a mount whose root is the directory itself. Therefore `..` does not lead out of the directory.
    let fd_directory = open("/proc/self/fd", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|directory| clone_tree(directory.as_fd(), false))
        .map_err(error("clone", "/proc/self/fd"))?;
    let root = match share {
        Some(share) => share,
        None => {
            let flags = flags | MsFlags::MS_RDONLY;
            mount(Some("husk"), PROC, Some("tmpfs"), flags, Some("size=4k,nr_inodes=1"))
                .map_err(error("mount a tmpfs at", PROC))?;
            Path::new(PROC)
        }
    };
    // pivot_root stacks the old root on the new root, and umount2 then removes the old root (pivot_root(2), NOTES).
    chdir(root).map_err(error("enter", root))?;
    pivot_root(".", ".").map_err(error("change the root to", root))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(error("unmount the old root from", root))?;
    chdir("/").map_err(error("enter", "/"))?;
    Ok((fd_directory.into(), dev_null))
}
