//! Pidfds: fds that refer to the same process even after its PID has been reused.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::new_fd;

/// Opens a pidfd for the process `pid` (pidfd_open(2), Linux 5.3). The pidfd is close-on-exec. It becomes readable when
/// the process ends.
///
/// # Errors
/// ESRCH if there is no such process, and the other errors of pidfd_open(2).
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers, and returns a new fd or -1.
    unsafe { new_fd(libc::syscall(libc::SYS_pidfd_open, pid, 0)) }
}

/// Sends a signal to the process (pidfd_send_signal(2), Linux 5.1). `signal` may be a real-time signal.
///
/// # Errors
/// ESRCH if the process has been reaped, and the other errors of pidfd_send_signal(2).
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed. The call takes no other pointer.
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, no_info, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Copies the fd `number` of the process into this thread's file table (pidfd_getfd(2), Linux 5.6). If the process has
/// several file tables, the number is that of its first thread. The copy is close-on-exec.
///
/// # Errors
/// EBADF if the process has no such fd, and the other errors of pidfd_getfd(2).
pub fn get_fd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers, and returns a new fd or -1.
    unsafe { new_fd(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0)) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no posix_spawn")]
    fn send_signal_reaches_the_process_until_it_is_reaped() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = open(child.id().cast_signed()).unwrap();
        send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(send_signal(pidfd.as_fd(), 0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pidfd_open")]
    fn open_fails_without_a_process() {
        assert_eq!(open(i32::MAX).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pidfd_open")]
    fn get_fd_copies_the_open_file() {
        let process = open(std::process::id().cast_signed()).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let copy = get_fd(process.as_fd(), writer.as_raw_fd()).unwrap();
        drop(writer);
        std::fs::File::from(copy).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert_eq!(get_fd(process.as_fd(), RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
