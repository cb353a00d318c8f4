//! Resource limits of the VMM process (getrlimit(2)).

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofsd::limits::setup_rlimit_nofile;

/// The limits to set. Each entry has a resource, the value of both its soft and its hard limit, and the reason.
///
/// A limit of 1 byte prevents core dumps. A limit of 0 would not always prevent core dumps: if core dumps are piped to
/// a program, the kernel ignores all limits except 1 (fs/coredump.c, `do_coredump`).
///
/// [`crate::process::prepare`] also clears the process's dumpable flag, but this does not prevent all core dumps. When
/// a VMM thread changes to the user id of a guest's user, the kernel sets the flag to the value of fs.suid_dumpable
/// (kernel/cred.c, `commit_creds`).
const LIMITS: [(Resource, u64, &str); 3] = [
    (Resource::RLIMIT_CORE, 1, "a core dump would hold guest memory"),
    (Resource::RLIMIT_MEMLOCK, 0, "the VMM locks no memory"),
    (Resource::RLIMIT_MSGQUEUE, 0, "the VMM uses no POSIX message queue"),
];

/// Error from setting a limit.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The maximum number of open fds could not be raised.
    #[error("failed to raise the VMM's fd limit (RLIMIT_NOFILE): {0}")]
    Fds(String),
    /// A limit of `LIMITS` could not be set.
    #[error("failed to set the VMM's {0:?}, which is limited because {1}")]
    Other(Resource, &'static str, #[source] Errno),
}

/// Returns the maximum number of open fds.
pub fn max_fds() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// Sets the limits, and raises the maximum number of open fds as far as the system allows. The VMM needs many fds,
/// because it holds an open fd for each file that the guest has looked up. Returns the maximum number of open fds.
pub fn set() -> Result<u64, LimitError> {
    let max_fds = setup_rlimit_nofile(None).map_err(LimitError::Fds)?;
    for (resource, limit, reason) in LIMITS {
        setrlimit(resource, limit, limit).map_err(|errno| LimitError::Other(resource, reason, errno))?;
    }
    Ok(max_fds)
}
