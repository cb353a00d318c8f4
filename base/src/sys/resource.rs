//! Resource limits of other processes (prlimit(2)). nix sets only the limits of the calling process.

use std::io;

use nix::unistd::Pid;

/// A soft and a hard limit. `libc::RLIM_INFINITY` means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The limit that the kernel enforces.
    pub soft: libc::rlim_t,
    /// The maximum of the soft limit.
    pub hard: libc::rlim_t,
}

/// Returns a process's previous limit. If `new` is not `None`, then sets the limit to `new`. `resource` is a constant
/// such as `libc::RLIMIT_NOFILE`.
///
/// # Errors
/// The errors of prlimit(2).
pub fn limit(pid: Pid, resource: libc::__rlimit_resource_t, new: Option<Limit>) -> io::Result<Limit> {
    let new = new.map(|new| libc::rlimit { rlim_cur: new.soft, rlim_max: new.hard });
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `new` is null or points to an rlimit, which the kernel reads. The kernel writes an rlimit to `old`. Both
    // outlive the call.
    match unsafe { libc::prlimit(pid.as_raw(), resource, new, &raw mut old) } {
        0 => Ok(Limit { soft: old.rlim_cur, hard: old.rlim_max }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn limit_of_a_child_changes() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let before = limit(pid, libc::RLIMIT_CORE, None).unwrap();
        let none = Limit { soft: 0, hard: 0 };
        assert_eq!(limit(pid, libc::RLIMIT_CORE, Some(none)).unwrap(), before);
        assert_eq!(limit(pid, libc::RLIMIT_CORE, None).unwrap(), none);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(limit(pid, libc::RLIMIT_CORE, None).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
