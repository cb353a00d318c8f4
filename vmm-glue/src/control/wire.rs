//! Messages on the control socket: each is one `SOCK_SEQPACKET` packet with JSON, and fds as ancillary data.
//!
//! `send` and `recv` make one system call each and keep the socket's mode. On a non-blocking socket they fail with
//! [`io::ErrorKind::WouldBlock`], so an asynchronous caller can wrap them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Maximum size of a message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Maximum number of fds in one message.
pub const MAX_FDS: usize = 64;
/// Size in bytes of the ancillary data for [`MAX_FDS`] fds.
// SAFETY: CMSG_SPACE only computes a value from its argument.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;

/// Ancillary data, aligned as `cmsghdr` requires.
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

/// Sends a message with fds.
///
/// # Errors
/// The error of `sendmsg`. [`io::ErrorKind::InvalidInput`] if the message or the number of fds exceeds its limit.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "failed to send a control message: too long or too many fds",
        ));
    }
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: msghdr has integers and raw pointers only, for which all-zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        let len = size_of_val(fds) as u32;
        header.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE only computes a value from its argument.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        // SAFETY: the control buffer is aligned for `cmsghdr` and has space for MAX_FDS fds, and `fds` has no more. So
        // the first header and its data lie within the buffer. BorrowedFd has the representation of a RawFd.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(len) as usize;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<RawFd>(), libc::CMSG_DATA(first).cast(), fds.len());
        }
    }
    loop {
        // SAFETY: the pointers in `header` are to the message and the ancillary data, which outlive the call.
        let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Receives a message with its fds, which are close-on-exec.
///
/// # Errors
/// The error of `recvmsg`. [`io::ErrorKind::UnexpectedEof`] if the other side has closed the socket.
/// [`io::ErrorKind::InvalidData`] if the packet is too long or is not a message of type `T`.
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: msghdr has integers and raw pointers only, for which all-zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_LEN;
    let received = loop {
        // SAFETY: the pointers in `header` are to writable buffers of the given lengths, which outlive the call.
        let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
        if let Ok(received) = usize::try_from(received) {
            break received;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let fds = take_fds(&header);
    if received == 0 && fds.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "failed to receive a control message: too long or too many fds",
        ));
    }
    let message = serde_json::from_slice(bytes.get(..received).unwrap_or_default())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((message, fds))
}

/// Takes ownership of every received fd, even if the message turns out to be invalid.
fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: recvmsg has filled the control buffer and set its length, and the CMSG macros stay within that length.
    // Each fd in an SCM_RIGHTS message is new and has no other owner.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_SOCKET && (*message).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                let len = (*message).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for index in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    fds
}

/// Creates a connected pair of control sockets, which are close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the pointer is to a writable array of two fds.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let [a, b] = fds;
    // SAFETY: socketpair succeeded, so both fds are open and have no other owner.
    unsafe { Ok((OwnedFd::from_raw_fd(a), OwnedFd::from_raw_fd(b))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn recv_returns_message_and_fds() {
        let (a, b) = pair().unwrap();
        let (mut reader, mut writer) = io::pipe().unwrap();
        send(&a, &("hello", 7), &[writer.as_fd(), a.as_fd()]).unwrap();
        let (message, mut fds) = recv::<(String, u32)>(&b).unwrap();
        assert_eq!(message, ("hello".to_owned(), 7));
        assert_eq!(fds.len(), 2);
        writer.write_all(b"x").unwrap();
        drop(writer);
        std::fs::File::from(fds.swap_remove(0)).write_all(b"y").unwrap();
        drop(fds);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xy");
    }

    #[test]
    fn recv_distinguishes_end_from_invalid_message() {
        let (a, b) = pair().unwrap();
        send(&a, &"text", &[]).unwrap();
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn send_rejects_too_long_message() {
        let (a, _b) = pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert_eq!(send(&a, &long, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
