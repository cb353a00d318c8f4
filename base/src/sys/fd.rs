//! Flags, copies and ranges of file descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::new_fd;

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

/// Gives this thread its own file table, which has only the fds below `first` (close_range(2) with CLOSE_RANGE_UNSHARE,
/// Linux 5.9). Threads that this thread starts later share this table. The kernel copies at least the first 64 fds, and
/// then closes the copies from `first` on. Such a close can block, for example for a file of a network file system.
///
/// # Errors
/// The errors of close_range(2).
///
/// # Safety
/// Afterwards, the thread and the threads that it starts must not use, close or drop any fd from `first` on that was
/// open before.
pub unsafe fn unshare_fds_below(first: u32) -> io::Result<()> {
    // SAFETY: the call takes no pointers. The caller guarantees that no code uses a closed fd again.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every fd of this process except standard input, output and error, and `kept` (close_range(2), Linux 5.9).
///
/// # Errors
/// The errors of close_range(2).
///
/// # Safety
/// The process must not use, close or drop any of the closed fds afterwards.
pub unsafe fn close_all_except(kept: impl AsFd) -> io::Result<()> {
    let close = |first: RawFd, last: RawFd| {
        // SAFETY: the caller guarantees that no code uses a closed fd again.
        match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let kept = kept.as_fd().as_raw_fd();
    if kept > libc::STDERR_FILENO + 1 {
        close(libc::STDERR_FILENO + 1, kept - 1)?;
    }
    close(kept.max(libc::STDERR_FILENO) + 1, RawFd::MAX)
}

/// Returns a copy of `fd` that is closed on exec (fcntl(2), F_DUPFD_CLOEXEC). The number of the copy is at least `min`.
///
/// # Errors
/// EINVAL if `min` exceeds the fd limit, and the other errors of fcntl(2).
pub fn duplicate_from(fd: impl AsFd, min: RawFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(min))?;
    // SAFETY: the kernel has just returned this new fd, and nothing else owns it.
    unsafe { new_fd(copy) }
}

/// Copies `fd` to the number `target` (dup2(2)). If another open fd already has this number, that fd is closed
/// first. The copy stays open on exec.
/// If `fd` itself has the number `target`, the call changes nothing, and the fd keeps its flags.
///
/// # Errors
/// The errors of dup2(2).
///
/// # Safety
/// If an fd with the number `target` has an owner in this process, the owner must expect the new file.
pub unsafe fn copy_to(fd: impl AsFd, target: RawFd) -> io::Result<()> {
    // SAFETY: the call takes two numbers. The caller guarantees that the owner of `target` expects the change.
    match unsafe { libc::dup2(fd.as_fd().as_raw_fd(), target) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Returns the number of bytes that a read of a pipe or stream socket would get (the ioctl FIONREAD, which is SIOCINQ
/// for sockets).
///
/// # Errors
/// The errors of the ioctl FIONREAD.
pub fn unread_bytes(fd: impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, and `count` is an int that outlives the call.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(usize::try_from(count).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::sys::process::{exit_immediately, wait};

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fork")]
    fn close_all_except_closes_all_other_fds() {
        let (reader, _writer) = io::pipe().unwrap();
        // SAFETY: the child process has one thread, and makes only system calls.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                // SAFETY: the process ends without using or dropping another fd.
                let closed = unsafe { close_all_except(&reader) }.is_ok();
                let open = |number: RawFd| {
                    // SAFETY: F_GETFD takes a number, which need not be that of an open fd.
                    (unsafe { libc::fcntl(number, libc::F_GETFD) }) != -1
                };
                let kept = reader.as_raw_fd();
                let others = (3..1024).any(|number| number != kept && open(number));
                exit_immediately(i32::from(!(closed && open(kept) && open(2) && !others)));
            }
            nix::unistd::ForkResult::Parent { child } => {
                assert_eq!(wait(child.as_raw(), 0), Ok(Some((child.as_raw(), 0))));
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no file tables")]
    fn unshare_fds_below_leaves_the_fds_of_other_threads_open() {
        let (reader, writer) = io::pipe().unwrap();
        let number = reader.as_raw_fd();
        let thread = std::thread::spawn(move || {
            // SAFETY: the thread owns no fd.
            unsafe { unshare_fds_below(3) }.unwrap();
            // SAFETY: F_GETFD takes a number, which need not be that of an open fd.
            let open = |number| (unsafe { libc::fcntl(number, libc::F_GETFD) }) != -1;
            (open(2), open(number))
        });
        assert_eq!(thread.join().unwrap(), (true, false));
        (&writer).write_all(b"x").unwrap();
        assert_eq!((&reader).read(&mut [0]).unwrap(), 1);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri does not track the close-on-exec flag: fcntl(F_GETFD) always returns FD_CLOEXEC")]
    fn copies_get_the_requested_numbers() {
        let (mut reader, writer) = io::pipe().unwrap();
        let copy = duplicate_from(&writer, 200).unwrap();
        assert!(copy.as_raw_fd() >= 200);
        assert_eq!(fcntl(&copy, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC);
        // SAFETY: the owner of the number, `copy`, gets another copy of the same pipe.
        unsafe { copy_to(&writer, copy.as_raw_fd()) }.unwrap();
        assert_eq!(fcntl(&copy, FcntlArg::F_GETFD).unwrap(), 0);
        drop(writer);
        std::fs::File::from(copy).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert_eq!(duplicate_from(&reader, RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no ioctl for pipes")]
    fn unread_bytes_counts_what_is_in_the_pipe() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"abc").unwrap();
        assert_eq!(unread_bytes(&reader).unwrap(), 3);
    }

    #[test]
    fn reading_an_empty_pipe_fails_after_set_nonblocking() {
        let (mut reader, _writer) = io::pipe().unwrap();
        set_nonblocking(&reader).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fcntl(F_SETFD)")]
    fn close_on_exec_from_sets_the_flag() {
        let (reader, _writer) = io::pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        close_on_exec_from(3).unwrap();
        assert_eq!(fcntl(&reader, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC);
    }
}
