//! The few socket calls of a connection, none of which blocks or raises SIGPIPE.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A connected pair of stream sockets.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: fds has room for the two descriptors.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let [one, other] = fds;
    // SAFETY: socketpair returned these two, and nothing else has them.
    Ok(unsafe { (OwnedFd::from_raw_fd(one), OwnedFd::from_raw_fd(other)) })
}

/// A slice as an element of an I/O vector that is only read from.
pub fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Sends what fits.
///
/// # Errors
/// The error of sendmsg; `WouldBlock` when nothing fits.
pub fn send(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let message = message(parts);
        // SAFETY: message and the memory it refers to live through the call, which only reads that memory.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Receives what is there, 0 at the end of the stream.
///
/// # Errors
/// The error of recvmsg; `WouldBlock` when nothing is there.
pub fn receive(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let mut message = message(parts);
        // SAFETY: the parts are writable memory that lives through the call: guest memory, or a caller's own buffer.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

fn message(parts: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr.
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

/// Shuts a direction; a socket that is already shut needs nothing.
pub fn shutdown(socket: &OwnedFd, how: libc::c_int) {
    // SAFETY: takes a descriptor and a number.
    unsafe { libc::shutdown(socket.as_raw_fd(), how) };
}

/// Ends both directions and throws away what the peer wrote in vain: closing with unread data would give the peer
/// ECONNRESET where it should see the end of the stream. Bounded by the peer's send buffer.
pub fn discard_unread(socket: &OwnedFd) {
    shutdown(socket, libc::SHUT_RDWR);
    let mut bytes = [0_u8; 4096];
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    while matches!(receive(socket, &[part]), Ok(1..)) {}
}
