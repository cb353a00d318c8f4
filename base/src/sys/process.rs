//! Sends signals, waits for processes and ends processes. This module represents a signal by its number.
//!
//! nix also has these calls, but nix's types lack real-time signals. If a real-time signal has ended a process, nix's
//! `waitpid` consumes the status and then fails.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;

/// Sends a signal to the process `pid` (kill(2)). If `pid` is negative, sends the signal to the process group `-pid`.
/// `signal` may be a real-time signal.
///
/// # Errors
/// EINVAL if there is no such signal, and the other errors of kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes no pointers.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for the child `pid`, or for any child if `pid` is -1 (waitpid(2)). Returns the child's PID and wait status.
/// Returns `None` if `flags` contains WNOHANG and no child has ended. Retries after EINTR.
///
/// # Errors
/// ECHILD if there is no such child.
pub fn wait(pid: i32, flags: libc::c_int) -> Result<Option<(i32, libc::c_int)>, Errno> {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to an integer that outlives the call.
        match unsafe { libc::waitpid(pid, &raw mut status, flags) } {
            0 => return Ok(None),
            pid if pid > 0 => return Ok(Some((pid, status))),
            _ => match Errno::last() {
                Errno::EINTR => {}
                errno => return Err(errno),
            },
        }
    }
}

/// Resets the action of a signal to the default (signal(2)).
///
/// # Errors
/// EINVAL for SIGKILL and SIGSTOP.
pub fn set_default_action(signal: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL is not a signal handler, so no code runs in a signal context.
    match unsafe { libc::signal(signal as libc::c_int, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What [`clone_sibling`] returns in each of the two processes.
#[derive(Debug)]
pub enum Cloned {
    /// This process is the caller.
    Caller {
        /// PID of the new process.
        pid: i32,
        /// Pidfd of the new process.
        pidfd: OwnedFd,
    },
    /// This process is the new one.
    Sibling,
}

/// Copies this process, as fork(2) does, but the new process becomes a child of this process's parent (CLONE_PARENT,
/// clone(2)). The parent gets SIGCHLD when the new process ends, and has to reap it.
///
/// # Errors
/// The errors of clone(2).
///
/// # Safety
/// If this process has more than one thread, the new process may call only async-signal-safe functions.
pub unsafe fn clone_sibling() -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: without a stack and without CLONE_VM, the call is equivalent to fork(2). The caller guarantees the
    // conditions under which fork(2) is safe (see Safety). `pidfd` outlives the call, in which the kernel writes an fd
    // to it.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) } {
        0 => Ok(Cloned::Sibling),
        pid => match i32::try_from(pid) {
            // SAFETY: the call returned a pid. Therefore, the kernel has stored a new fd in `pidfd`, and nothing else
            // owns this fd.
            Ok(pid) if pid > 0 => Ok(Cloned::Caller { pid, pidfd: unsafe { super::new_fd(pidfd) }? }),
            _ => Err(io::Error::last_os_error()),
        },
    }
}

/// `struct clone_args` of linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Copies this process like [`clone_sibling`]. The new process starts in `cgroup`, which is the open directory of a
/// cgroup v2 (CLONE_INTO_CGROUP, Linux 5.7). The new process has the exit signal of this process.
///
/// # Errors
/// EBUSY if the cgroup cannot have processes, and the other errors of clone3(2).
///
/// # Safety
/// See [`clone_sibling`].
pub unsafe fn clone_sibling_into(cgroup: impl AsFd) -> io::Result<Cloned> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: libc::c_int = -1;
    let args = CloneArgs {
        flags: u64::from((libc::CLONE_PARENT | libc::CLONE_PIDFD).cast_unsigned()) | CLONE_INTO_CGROUP,
        pidfd: (&raw mut pidfd) as u64,
        cgroup: u64::from(cgroup.as_fd().as_raw_fd().unsigned_abs()),
        ..Default::default()
    };
    // SAFETY: without a stack and without CLONE_VM, the call is equivalent to fork(2). The caller guarantees the
    // conditions under which fork(2) is safe (see Safety). The arguments and `pidfd` outlive the call, in which the kernel
    // writes an fd to `pidfd`.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) } {
        0 => Ok(Cloned::Sibling),
        pid => match i32::try_from(pid) {
            // SAFETY: the call returned a pid. Therefore, the kernel has stored a new fd in `pidfd`, and nothing else
            // owns this fd.
            Ok(pid) if pid > 0 => Ok(Cloned::Caller { pid, pidfd: unsafe { super::new_fd(pidfd) }? }),
            _ => Err(io::Error::last_os_error()),
        },
    }
}

/// Ends the process with all its threads at once (_exit(2)). Runs no destructors or exit handlers, and flushes no
/// buffers.
pub fn exit_immediately(code: i32) -> ! {
    // SAFETY: _exit takes no pointers and has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Returns the securebits flags of this thread (capabilities(7)).
///
/// # Errors
/// The errors of prctl(2).
pub fn secure_bits() -> io::Result<libc::c_int> {
    // SAFETY: PR_GET_SECUREBITS takes no pointer.
    match unsafe { libc::prctl(libc::PR_GET_SECUREBITS) } {
        -1 => Err(io::Error::last_os_error()),
        bits => Ok(bits),
    }
}

/// Sets the securebits flags of this thread (capabilities(7)).
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn set_secure_bits(bits: libc::c_int) -> io::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes flags and no pointer.
    match unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives this process and its later children the lowest priority: they run when no other process wants the CPU
/// (SCHED_IDLE in sched(7)).
///
/// # Errors
/// The error of sched_setscheduler(2).
pub fn lower_priority() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is valid, and outlives the call.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no posix_spawn")]
    fn wait_returns_the_status_of_a_real_time_signal() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert_eq!(wait(pid, libc::WNOHANG), Ok(None));
        let signal = libc::SIGRTMIN() + 3;
        kill(pid, signal).unwrap();
        let (waited, status) = wait(pid, 0).unwrap().unwrap();
        assert_eq!((waited, libc::WTERMSIG(status)), (pid, signal));
        assert_eq!(wait(pid, 0), Err(Errno::ECHILD));
        assert!(child.wait().is_err());
        assert_eq!(kill(std::process::id().cast_signed(), 1000).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fork")]
    fn sibling_is_a_child_of_the_parent() {
        // SAFETY: the child process has one thread, and makes only system calls.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                // SAFETY: the calling process has one thread.
                match unsafe { clone_sibling() } {
                    Ok(Cloned::Sibling) => exit_immediately(7),
                    Ok(Cloned::Caller { .. }) => exit_immediately(0),
                    Err(_) => exit_immediately(1),
                }
            }
            nix::unistd::ForkResult::Parent { child } => {
                assert_eq!(wait(child.as_raw(), 0), Ok(Some((child.as_raw(), 0))));
                // The list has only the children of this thread.
                let children = std::fs::read_to_string("/proc/thread-self/children").unwrap();
                let statuses = children.split_whitespace().filter_map(|pid| {
                    let (_, status) = wait(pid.parse().ok()?, 0).ok()??;
                    Some(libc::WEXITSTATUS(status))
                });
                assert_eq!(statuses.collect::<Vec<_>>(), [7]);
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no clone3")]
    fn clone_sibling_into_fails_if_the_fd_is_not_of_a_cgroup() {
        // SAFETY: the call fails, so there is no new process.
        let error = unsafe { clone_sibling_into(std::fs::File::open("/").unwrap()) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no signal")]
    fn set_default_action_rejects_sigkill() {
        set_default_action(Signal::SIGWINCH).unwrap();
        assert!(set_default_action(Signal::SIGKILL).is_err());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no prctl")]
    fn secure_bits_can_be_set_to_their_current_value() {
        let bits = secure_bits().unwrap();
        set_secure_bits(bits).expect("this test needs root, because it sets the securebits flags");
        assert_eq!(secure_bits().unwrap(), bits);
    }
}
