//! Sends and receives packets with fds over Unix sockets (SCM_RIGHTS, unix(7)).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Maximum number of fds that [`receive`] accepts in one packet.
pub const MAX_FDS: usize = 64;

/// Size of the ancillary data for [`MAX_FDS`] fds: a header and the fds, padded to the alignment of the header.
const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + (MAX_FDS * size_of::<RawFd>()).next_multiple_of(8);

/// Ancillary data, aligned as `cmsghdr` requires.
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

/// Sends bytes with fds in one system call, and raises no SIGPIPE. Returns the number of bytes that were sent.
///
/// # Errors
/// The errors of sendmsg(2), such as [`io::ErrorKind::WouldBlock`] on a non-blocking socket. Retries after EINTR.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let socket = socket.as_fd().as_raw_fd();
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[][..] } else { &rights };
    loop {
        match sendmsg::<()>(socket, &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::Error::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

/// A packet that was received.
#[derive(Debug)]
pub struct Packet {
    /// Number of bytes that were received.
    pub len: usize,
    /// The fds, which are close-on-exec. If the packet is truncated, some fds may be missing.
    pub fds: Vec<OwnedFd>,
    /// Whether bytes or fds were dropped because the packet was larger than the buffer.
    pub truncated: bool,
}

/// Receives bytes and fds in one system call. Returns every received fd as an owned fd, even if the packet is
/// truncated. nix's `recvmsg` does not return the fds of a truncated packet. With that function, these fds would stay
/// open, and a peer could exhaust this process's fds.
///
/// # Errors
/// The errors of recvmsg(2), such as [`io::ErrorKind::WouldBlock`] on a non-blocking socket. Retries after EINTR.
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Packet> {
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL_LEN]);
    let mut header = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut iov,
        msg_iovlen: 1,
        msg_control: control.0.as_mut_ptr().cast(),
        msg_controllen: CONTROL_LEN,
        msg_flags: 0,
    };
    let len = loop {
        // SAFETY: the pointers in `header` point to writable buffers of the given lengths. The buffers outlive the
        // call.
        let len = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        if let Ok(len) = usize::try_from(len) {
            break len;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    // SAFETY: recvmsg has filled the control buffer and set its length. Each fd in an SCM_RIGHTS message is new and has
    // no other owner.
    let fds = unsafe { take_fds(&header) };
    Ok(Packet { len, fds, truncated })
}

/// Returns the fds of all SCM_RIGHTS messages in the control buffer of `header`.
///
/// # Safety
/// `msg_control` must point to `msg_controllen` bytes of control messages, aligned for `cmsghdr`. Each fd in an
/// SCM_RIGHTS message must be open and have no other owner.
unsafe fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the CMSG macros stay within the control buffer, whose length the caller ensures. The caller also ensures
    // that the fds have no other owner.
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn fds_arrive_with_the_bytes() {
        let (a, b) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(send(&a, b"hello", &[writer.as_fd(), a.as_fd()]).unwrap(), 5);
        drop(writer);
        let mut bytes = [0; 16];
        let mut packet = receive(&b, &mut bytes).unwrap();
        assert_eq!((&bytes[..packet.len], packet.fds.len(), packet.truncated), (&b"hello"[..], 2, false));
        std::fs::File::from(packet.fds.swap_remove(0)).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn take_fds_returns_the_fds_of_each_message() {
        let mut control = Control([0; CONTROL_LEN]);
        let mut header = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: std::ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: control.0.as_mut_ptr().cast(),
            msg_controllen: CONTROL_LEN,
            msg_flags: 0,
        };
        let (mut reader, writer) = io::pipe().unwrap();
        let copies: Vec<RawFd> = (0..3).map(|_| OwnedFd::from(writer.try_clone().unwrap()).into_raw_fd()).collect();
        // SAFETY: no control message was written yet.
        assert!(unsafe { take_fds(&libc::msghdr { msg_controllen: 0, ..header }) }.is_empty());
        // SAFETY: the messages fit into the control buffer. Each of the copies is in one SCM_RIGHTS message.
        let fds = unsafe {
            let mut end = 0;
            for (kind, fds) in [(libc::SCM_RIGHTS, &copies[..1]), (2, &[9][..]), (libc::SCM_RIGHTS, &copies[1..])] {
                let message = control.0.as_mut_ptr().add(end).cast::<libc::cmsghdr>();
                (*message).cmsg_level = libc::SOL_SOCKET;
                (*message).cmsg_type = kind;
                let bytes = size_of_val(fds) as u32;
                (*message).cmsg_len = libc::CMSG_LEN(bytes) as usize;
                libc::CMSG_DATA(message).cast::<RawFd>().copy_from_nonoverlapping(fds.as_ptr(), fds.len());
                end += libc::CMSG_SPACE(bytes) as usize;
            }
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = end;
            take_fds(&header)
        };
        assert_eq!(fds.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>(), copies);
        drop(writer);
        drop(fds);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn receive_accepts_the_maximum_number_of_fds() {
        let (a, b) = pair();
        send(&a, b"x", &[a.as_fd(); MAX_FDS]).unwrap();
        let packet = receive(&b, &mut [0]).unwrap();
        assert_eq!((packet.fds.len(), packet.truncated), (MAX_FDS, false));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn fds_of_truncated_packets_are_closed() {
        let (a, b) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&a, b"too long", &[writer.as_fd()]).unwrap();
        send(&a, b"x", &[writer.as_fd(); MAX_FDS + 2]).unwrap();
        drop(writer);
        assert!(receive(&b, &mut [0; 3]).unwrap().truncated);
        assert!(receive(&b, &mut [0; 3]).unwrap().truncated);
        // The reader sees the end of the pipe only if every copy of the writer is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn bytes_arrive_without_fds() {
        let (a, b) = pair();
        send(&a, b"plain", &[]).unwrap();
        assert!(receive(&b, &mut [0; 8]).unwrap().fds.is_empty());
        drop(a);
        assert_eq!(receive(&b, &mut [0; 8]).unwrap().len, 0);
    }
}
