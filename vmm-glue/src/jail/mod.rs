//! The jail of the VMM process limits what the process can see and do once it runs a guest.
//!
//! [`enter`] confines the whole process. The VMM calls [`enter`] once, after it has received its configuration and
//! before it starts a second thread. Later, each thread first calls [`confine`], which drops every right that the
//! thread's kind does not need.

mod capabilities;
mod kind;
mod landlock;
mod limits;
mod root;
pub mod seccomp;
mod thread;

pub use self::kind::Kind;
#[cfg(test)]
pub(crate) use self::landlock::restrict;
pub use self::landlock::{Landlock, LandlockError};
pub use self::limits::LimitError;
pub use self::root::RootError;
pub use self::thread::{ConfineError, confine};

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;

use self::seccomp::ViolationError;
use crate::config::SeccompMode;

/// Whether this build leaves out the jail. Only benchmarks use such a build, to measure what the jail costs.
pub const UNJAILED: bool = cfg!(feature = "unjailed");

/// The files and the limit that the process opened or read before it entered the jail.
#[derive(Debug)]
pub struct Belongings {
    /// `/proc/self/fd`, the process's directory of open fds. `..` does not lead out of this directory.
    pub fd_directory: File,
    /// `/dev/null`, opened for writing.
    pub dev_null: File,
    /// Maximum number of open fds.
    pub max_fds: u64,
}

impl Belongings {
    /// Returns belongings with copies of the fds.
    ///
    /// # Errors
    /// If an fd cannot be duplicated.
    pub fn try_clone(&self) -> io::Result<Self> {
        let Self { fd_directory, dev_null, max_fds } = self;
        Ok(Self { fd_directory: fd_directory.try_clone()?, dev_null: dev_null.try_clone()?, max_fds: *max_fds })
    }

    /// Returns the belongings of a process that is not in a jail, for tests.
    ///
    /// # Errors
    /// The call fails if /proc or /dev is not mounted.
    pub fn without_jail() -> io::Result<Self> {
        let fd_directory = File::options().read(true).custom_flags(libc::O_PATH).open("/proc/self/fd")?;
        let dev_null = File::options().write(true).open("/dev/null")?;
        Ok(Self { fd_directory, dev_null, max_fds: limits::max_fds()? })
    }
}

/// Error from confining the process.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A resource limit could not be set.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A namespace could not be created.
    #[error("failed to create the VMM's mount, IPC, UTS and cgroup namespaces")]
    Namespaces(#[source] io::Error),
    /// /proc or /dev is not mounted. This error occurs only if [`UNJAILED`] is true.
    #[error("failed to open /proc/self/fd and /dev/null")]
    Belongings(#[source] io::Error),
    /// The root directory could not be changed.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The capability bounding set could not be reduced.
    #[error("failed to reduce the VMM's capability bounding set")]
    Bounding(#[source] io::Error),
    /// `prctl(PR_SET_NO_NEW_PRIVS)` failed.
    #[error("failed to set no_new_privs for the VMM")]
    NoNewPrivileges(#[source] io::Error),
    /// The handler for violations of seccomp filters could not be installed.
    #[error(transparent)]
    Seccomp(#[from] ViolationError),
    /// Landlock could not restrict the process.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
}

/// Result of entering the jail.
#[derive(Debug)]
pub struct Entered {
    /// The files and the limit that the process opened or read before it entered the jail.
    pub belongings: Belongings,
    /// A string that names the restrictions that the host's kernel lacks. `None` if no restriction is missing.
    pub unrestricted: Option<String>,
}

/// Confines the process. Sets resource limits and no_new_privs, creates namespaces, makes the share the root directory,
/// limits the capability bounding set to the virtio-fs server's capabilities, and sets landlock rules. If
/// `require_landlock` is true, a host kernel that cannot restrict access to files with landlock is an error.
///
/// Without a share, the root is an empty, read-only directory. The shim sets the PID and network namespaces when it
/// spawns the process ([`crate::client::spawn`]).
///
/// # Errors
/// [`JailError`]. After an error the process may be confined only in part, and must end.
pub fn enter(share: Option<&Path>, require_landlock: bool, seccomp: SeccompMode) -> Result<Entered, JailError> {
    let max_fds = limits::set()?;
    if UNJAILED {
        let belongings = Belongings { max_fds, ..Belongings::without_jail().map_err(JailError::Belongings)? };
        return Ok(Entered { belongings, unrestricted: Some("this build of the VMM has no jail".to_owned()) });
    }
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).map_err(|errno| JailError::Namespaces(errno.into()))?;
    let (fd_directory, dev_null) = root::enter(share)?;
    capabilities::bound().map_err(JailError::Bounding)?;
    prctl::set_no_new_privs().map_err(|errno| JailError::NoNewPrivileges(errno.into()))?;
    // The landlock rules forbid mounts. Therefore the root directory is set up before the rules.
    let unrestricted = landlock::restrict(share.map(|_| Path::new("/")), require_landlock)?;
    seccomp::prepare(seccomp)?;
    Ok(Entered { belongings: Belongings { fd_directory, dev_null, max_fds }, unrestricted })
}
