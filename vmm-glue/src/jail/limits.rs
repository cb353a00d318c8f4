//! Resource limits of the VMM process (getrlimit(2)).

use std::{fs, io};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Maximum number of open fds, if the host allows as many. virtiofsd has the same default.
const MAX_FDS: u64 = 1_000_000;
/// The VMM may open at most `fs.file-max` divided by this number. `fs.file-max` limits the open files of all processes
/// of the host together. Otherwise, a guest that opens many files could keep the node's other processes from opening
/// files.
const ALL_FILES_DIVISOR: u64 = 4;
/// Sysctls that limit the number of open files of a process, and of all processes together.
const NR_OPEN: &str = "/proc/sys/fs/nr_open";
const FILE_MAX: &str = "/proc/sys/fs/file-max";

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
    /// A sysctl that limits the number of open files could not be read.
    #[error("failed to read {0}, which limits the number of open files")]
    Sysctl(&'static str, #[source] io::Error),
    /// The maximum number of open fds could not be set.
    #[error("failed to set the VMM's fd limit (RLIMIT_NOFILE) to {0}")]
    Fds(u64, #[source] Errno),
    /// A limit of `LIMITS` could not be set.
    #[error("failed to set the VMM's {0:?}, which is limited because {1}")]
    Other(Resource, &'static str, #[source] Errno),
}

/// Returns the maximum number of open fds.
pub fn max_fds() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// Sets the limits. Sets the maximum number of open fds to [`fd_limit`], regardless of the limit that the VMM has
/// inherited. The VMM needs many fds, because it holds an open fd for each file that the guest has looked up. Returns
/// the maximum number of open fds.
pub fn set() -> Result<u64, LimitError> {
    let max_fds = fd_limit(read(NR_OPEN)?, read(FILE_MAX)?);
    let max_fds = match setrlimit(Resource::RLIMIT_NOFILE, max_fds, max_fds) {
        // Without CAP_SYS_RESOURCE, a process cannot raise its hard limit.
        Err(Errno::EPERM) => {
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|errno| LimitError::Fds(max_fds, errno))?;
            log::warn!("the VMM's fd limit stays at {hard}, because the VMM may not raise its hard limit to {max_fds}");
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard)
        }
        set => set.map(|()| max_fds),
    }
    .map_err(|errno| LimitError::Fds(max_fds, errno))?;
    for (resource, limit, reason) in LIMITS {
        setrlimit(resource, limit, limit).map_err(|errno| LimitError::Other(resource, reason, errno))?;
    }
    Ok(max_fds)
}

/// Returns the maximum number of open fds of a VMM.
fn fd_limit(nr_open: u64, file_max: u64) -> u64 {
    MAX_FDS.min(nr_open).min(file_max / ALL_FILES_DIVISOR)
}

/// Reads a sysctl that has a number.
fn read(sysctl: &'static str) -> Result<u64, LimitError> {
    let text = fs::read_to_string(sysctl).map_err(|error| LimitError::Sysctl(sysctl, error))?;
    text.trim().parse().map_err(|error| LimitError::Sysctl(sysctl, io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fd_limit_is_bounded_on_a_host_that_allows_more() {
        // systemd raises both sysctls to the maximum at boot.
        assert_eq!(fd_limit(1 << 30, i64::MAX as u64), 1_000_000);
    }

    #[test]
    fn fd_limit_is_a_quarter_of_the_files_of_all_processes_on_a_small_host() {
        assert_eq!(fd_limit(1 << 20, 200_000), 50_000);
        assert_eq!(fd_limit(2048, 200_000), 2048);
    }

    #[test]
    fn sysctls_are_numbers() {
        assert!(read(NR_OPEN).unwrap() > 0 && read(FILE_MAX).unwrap() > 0);
    }
}
