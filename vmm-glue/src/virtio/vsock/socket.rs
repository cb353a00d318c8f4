//! Socket calls of a connection. These functions neither block nor raise SIGPIPE.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::Shutdown;

/// Returns an I/O vector element for a slice. The caller must use the element only for system calls that read from the
/// slice.
pub fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Sends as much as the socket accepts.
///
/// # Errors
/// Returns the error of sendmsg(2), for example `WouldBlock` if the socket is full.
pub fn send(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let message = message(parts);
        // SAFETY: the pointers in `message` point to `parts`, which outlives the call, and to memory that callers keep
        // valid. sendmsg only reads from this memory.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Receives available data. Returns 0 at the end of the stream.
///
/// # Errors
/// Returns the error of recvmsg(2), for example `WouldBlock` if there is no data.
pub fn receive(socket: &OwnedFd, parts: &[libc::iovec]) -> io::Result<usize> {
    retry(|| {
        let mut message = message(parts);
        // SAFETY: the pointers in `message` point to `parts`, which outlives the call. The buffers are guest memory
        // that the device may write, or a caller's buffer. Callers keep this memory valid.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

fn message(parts: &[libc::iovec]) -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: parts.as_ptr().cast_mut(),
        msg_iovlen: parts.len(),
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
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

/// Shuts down a direction of a socket. Ignores an error, because the socket may already be shut down.
pub fn shutdown(socket: &OwnedFd, direction: Shutdown) {
    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), direction);
}

/// Shuts down both directions and drops unread data. If the socket were closed while it has unread data, the peer would
/// see ECONNRESET instead of the end of the stream. The peer's send buffer limits the amount of unread data.
pub fn discard_unread(socket: &OwnedFd) {
    shutdown(socket, Shutdown::Both);
    let mut bytes = [0_u8; 4096];
    let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    while matches!(receive(socket, &[part]), Ok(1..)) {}
}
