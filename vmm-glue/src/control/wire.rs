//! Messages on the control socket: one `SOCK_SEQPACKET` packet each, JSON with descriptors beside it.
//!
//! Both functions are single system calls and keep to the socket's mode: on a non-blocking socket they fail with
//! [`io::ErrorKind::WouldBlock`], so that an asynchronous caller can wrap them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Most descriptors in one message.
pub const MAX_FDS: usize = 64;
/// Bytes of ancillary data that hold so many.
// SAFETY: CMSG_SPACE computes on its argument only.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;

/// Ancillary data, aligned as its headers need.
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

/// Sends a message with descriptors.
///
/// # Errors
/// Those of `sendmsg`; [`io::ErrorKind::InvalidInput`] when message or descriptors are more than the bounds.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "control message too long"));
    }
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        let len = size_of_val(fds) as u32;
        header.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE computes on its argument only.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
        // SAFETY: the control buffer has room for MAX_FDS descriptors, so the first header and its data lie in it;
        // BorrowedFd has the representation of a RawFd.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(len) as usize;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<RawFd>(), libc::CMSG_DATA(first).cast(), fds.len());
        }
    }
    loop {
        // SAFETY: header, message and ancillary data live until the call returns.
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

/// Receives a message and its descriptors, which are close-on-exec.
///
/// # Errors
/// Those of `recvmsg`; [`io::ErrorKind::UnexpectedEof`] when the other side is gone, [`io::ErrorKind::InvalidData`]
/// when the packet is too long or no message of this type.
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_LEN;
    let received = loop {
        // SAFETY: header and buffers live until the call returns.
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
        return Err(io::Error::new(io::ErrorKind::InvalidData, "control message too long"));
    }
    let message = serde_json::from_slice(bytes.get(..received).unwrap_or_default())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((message, fds))
}

/// Takes ownership of every descriptor that came, whatever becomes of the message.
fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control buffer and its length; the CMSG macros stay within it, and each
    // descriptor in an SCM_RIGHTS message is ours alone.
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

/// A connected pair of control sockets, close-on-exec.
///
/// # Errors
/// Those of `socketpair`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for two descriptors.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let [a, b] = fds;
    // SAFETY: socketpair has just given us both.
    unsafe { Ok((OwnedFd::from_raw_fd(a), OwnedFd::from_raw_fd(b))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn message_and_descriptors_arrive() {
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
    fn end_and_rubbish_are_told_apart() {
        let (a, b) = pair().unwrap();
        send(&a, &"text", &[]).unwrap();
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn too_long_is_refused() {
        let (a, _b) = pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert_eq!(send(&a, &long, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
