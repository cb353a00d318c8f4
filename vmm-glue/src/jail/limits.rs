//! Resource limits of the VMM process (getrlimit(2)).

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofsd::limits::setup_rlimit_nofile;

/// The limits and their reasons. Each value is both the soft and the hard limit.
///
/// A core size of 1 byte prevents core dumps. A core size of 0 would not prevent them: if core dumps go to a program,
/// the kernel ignores every limit except 1 (fs/coredump.c, `do_coredump`). Clearing the dumpable flag is not sufficient
/// either, because each switch to a guest's user sets this flag to fs.suid_dumpable (kernel/cred.c, `commit_creds`).
const LIMITS: [(Resource, u64, &str); 3] = [
    (Resource::RLIMIT_CORE, 1, "no core dump: a core dump would contain guest memory"),
    (Resource::RLIMIT_MEMLOCK, 0, "the VMM does not lock memory"),
    (Resource::RLIMIT_MSGQUEUE, 0, "the VMM does not use POSIX message queues"),
];

/// Error of setting a limit.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The fd limit could not be raised.
    #[error("failed to raise the VMM's fd limit (RLIMIT_NOFILE): {0}")]
    Fds(String),
    /// Another limit could not be set. Contains the limit and its reason.
    #[error("failed to set {0:?} of the VMM: {1}")]
    Other(Resource, &'static str, #[source] Errno),
}

/// Returns the maximum number of open fds.
pub fn max_fds() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// Sets the limits. Raises the maximum number of open fds as far as the system allows, because the VMM has an open fd
/// for each file that the guest knows. Returns this maximum.
pub fn set() -> Result<u64, LimitError> {
    let max_fds = setup_rlimit_nofile(None).map_err(LimitError::Fds)?;
    for (resource, limit, reason) in LIMITS {
        setrlimit(resource, limit, limit).map_err(|errno| LimitError::Other(resource, reason, errno))?;
    }
    Ok(max_fds)
}
