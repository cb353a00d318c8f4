//! Flags of file descriptors.

use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Makes reads and writes of an open file description non-blocking.
///
/// # Errors
/// The errors of fcntl(2).
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sets the close-on-exec flag of the fd `first` and of all higher fds (close_range(2) with CLOSE_RANGE_CLOEXEC, Linux
/// 5.11).
///
/// # Errors
/// The errors of close_range(2).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes no pointers. With this flag, it closes no fd, so every fd keeps its owner.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn reading_an_empty_pipe_fails_after_set_nonblocking() {
        let (mut reader, _writer) = io::pipe().unwrap();
        set_nonblocking(&reader).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn close_on_exec_from_sets_the_flag() {
        let (reader, _writer) = io::pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        close_on_exec_from(3).unwrap();
        assert_eq!(fcntl(&reader, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC);
    }
}
