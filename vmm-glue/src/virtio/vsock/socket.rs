//! Socket calls of a connection. None of them blocks or raises SIGPIPE.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Creates a connected pair of stream sockets.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the pointer is to a writable array of two fds.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let [one, other] = fds;
    // SAFETY: socketpair succeeded, so both fds are open and have no other owner.
    Ok(unsafe { (OwnedFd::from_raw_fd(one), OwnedFd::from_raw_fd(other)) })
}

/// Returns an I/O vector element for a slice, for system calls that only read from it.
pub fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Sends as much as the socket accepts.
///
/// # Errors
/// The error of sendmsg. `WouldBlock` if the socket is full.
pub fn send(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let message = message(parts);
        // SAFETY: the pointers in `message` are to `parts`, which outlives the call, and to memory that callers keep
        // valid. sendmsg only reads from it.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Receives available data. Returns 0 at the end of the stream.
///
/// # Errors
/// The error of recvmsg. `WouldBlock` if there is no data.
pub fn receive(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let mut message = message(parts);
        // SAFETY: the pointers in `message` are to `parts`, which outlives the call. The parts are guest memory that
        // the device may write, or a caller's buffer; callers keep both valid.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

fn message(parts: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr has integers and raw pointers only, for which all-zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_ptr().cast_mut();
    message.msg_iovlen = parts.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Shuts down a direction. Best effort: a socket that is already shut down needs nothing.
pub fn shutdown(socket: &OwnedFd, how: libc::c_int) {
    // SAFETY: shutdown takes no pointers, and the fd is open because `socket` is borrowed.
    unsafe { libc::shutdown(socket.as_raw_fd(), how) };
}

/// Shuts down both directions and drops unread data. Closing a socket with unread data would give the peer ECONNRESET
/// where it should see the end of the stream. The peer's send buffer limits the amount.
pub fn discard_unread(socket: &OwnedFd) {
    shutdown(socket, libc::SHUT_RDWR);
    let mut bytes = [0_u8; 4096];
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    while matches!(receive(socket, &[part]), Ok(1..)) {}
}
