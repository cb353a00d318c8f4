//! Sends and receives packets with fds over Unix sockets (SCM_RIGHTS, unix(7)).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Maximum number of fds that [`receive`] accepts in one packet.
pub const MAX_FDS: usize = 64;

/// Size of the ancillary data for [`MAX_FDS`] fds: a header and the fds, padded to the alignment of the header.
const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + (MAX_FDS * size_of::<RawFd>()).next_multiple_of(8);

/// asm-generic/socket.h. The crate libc does not have this option yet.
const SO_PASSRIGHTS: libc::c_int = 83;

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
    /// The fds, which are close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Whether bytes are missing, because the packet was larger than the buffer.
    pub truncated: bool,
    /// Whether fds were dropped: more than [`MAX_FDS`], over the fd limit, or any fd with [`receive_bytes`].
    pub lost_fds: bool,
}

/// Receives bytes and fds in one system call. Returns every received fd as an owned fd, even if the packet is
/// truncated. nix's `recvmsg` does not return the fds of a truncated packet. With that function, these fds would stay
/// open, and a peer could exhaust this process's fds.
///
/// # Errors
/// The errors of recvmsg(2), such as [`io::ErrorKind::WouldBlock`] on a non-blocking socket. Retries after EINTR.
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Packet> {
    let mut control = Control([0; CONTROL_LEN]);
    let (len, header) = recvmsg(socket, bytes, &mut control.0, libc::MSG_CMSG_CLOEXEC)?;
    // SAFETY: recvmsg has filled the control buffer and set its length. Each fd in an SCM_RIGHTS message is new and has
    // no other owner.
    let fds = unsafe { take_fds(&header) };
    Ok(Packet { len, fds, truncated: is_set(&header, libc::MSG_TRUNC), lost_fds: is_set(&header, libc::MSG_CTRUNC) })
}

/// Receives the bytes of a packet from a peer that must not send fds. The kernel drops fds that the peer sends
/// nevertheless, and `lost_fds` of the packet says so. This process never owns such an fd. Otherwise, it would have to
/// close the fd, and close(2) can block, for example if the file system hangs.
///
/// # Errors
/// The errors of recvmsg(2), such as [`io::ErrorKind::WouldBlock`] on a non-blocking socket. Retries after EINTR.
pub fn receive_bytes(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Packet> {
    let (len, header) = recvmsg(socket, bytes, &mut [], 0)?;
    // Without a control buffer, the kernel sets MSG_CTRUNC if the packet has fds (`scm_recv_unix` in net/core/scm.c).
    let (truncated, lost_fds) = (is_set(&header, libc::MSG_TRUNC), is_set(&header, libc::MSG_CTRUNC));
    Ok(Packet { len, fds: Vec::new(), truncated, lost_fds })
}

/// Sets whether a socket accepts fds (SO_PASSRIGHTS, Linux 6.16). If `accept` is false, sendmsg(2) of a peer that sends
/// fds fails with EPERM. If `accept` is true, even [`receive_bytes`] can drop the last reference to a file, and block,
/// for example if an NFS server does not answer a CLOSE.
///
/// # Errors
/// The errors of setsockopt(2), such as ENOPROTOOPT on older kernels.
pub fn accept_fds(socket: impl AsFd, accept: bool) -> io::Result<()> {
    let value = libc::c_int::from(accept);
    let (socket, len) = (socket.as_fd().as_raw_fd(), libc::c_int::BITS / 8);
    // SAFETY: the kernel reads an int from `value`, which outlives the call.
    match unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const value).cast(), len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_set(header: &libc::msghdr, flag: libc::c_int) -> bool {
    header.msg_flags & flag != 0
}

/// Calls recvmsg(2). Returns the number of bytes and the header, which points to `control`.
fn recvmsg(
    socket: impl AsFd,
    bytes: &mut [u8],
    control: &mut [u8],
    flags: libc::c_int,
) -> io::Result<(usize, libc::msghdr)> {
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let no_control = control.is_empty();
    let mut header = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut iov,
        msg_iovlen: 1,
        msg_control: if no_control { std::ptr::null_mut() } else { control.as_mut_ptr().cast() },
        msg_controllen: control.len(),
        msg_flags: 0,
    };
    loop {
        // SAFETY: the pointers in `header` point to writable buffers of the given lengths. The buffers outlive the
        // call.
        let len = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags) };
        if let Ok(len) = usize::try_from(len) {
            header.msg_iov = std::ptr::null_mut();
            header.msg_iovlen = 0;
            return Ok((len, header));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
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
    use crate::sys::process::{exit_immediately, wait};
    use crate::sys::resource;

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
        assert_eq!((packet.fds.len(), packet.lost_fds), (MAX_FDS, false));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn fds_of_truncated_packets_are_closed() {
        let (a, b) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&a, b"too long", &[writer.as_fd()]).unwrap();
        send(&a, b"x", &[writer.as_fd(); MAX_FDS + 2]).unwrap();
        drop(writer);
        let [long, many] = [(); 2].map(|()| receive(&b, &mut [0; 3]).unwrap());
        assert_eq!((long.truncated, long.lost_fds), (true, false));
        assert_eq!((many.truncated, many.lost_fds, many.len), (false, true, 1));
        drop((long, many));
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

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fork")]
    fn packet_arrives_without_its_fds_at_the_fd_limit() {
        let (a, b) = pair();
        send(&a, b"x", &[a.as_fd()]).unwrap();
        // SAFETY: the child process has one thread, and makes only system calls.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let none = resource::Limit { soft: 0, hard: 0 };
                let limited = resource::limit(nix::unistd::getpid(), libc::RLIMIT_NOFILE, Some(none)).is_ok();
                let lost = receive(&b, &mut [0; 3]).is_ok_and(|packet| packet.lost_fds && packet.len == 1);
                exit_immediately(i32::from(!(limited && lost)));
            }
            nix::unistd::ForkResult::Parent { child } => {
                assert_eq!(wait(child.as_raw(), 0), Ok(Some((child.as_raw(), 0))));
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn receive_bytes_drops_fds() {
        let (a, b) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut bytes = [0; 3];
        for (packet, fds) in [(&b"abc"[..], 0), (b"ab", 1), (b"long", MAX_FDS + 2), (b"", 1), (b"", 0)] {
            send(&a, packet, &vec![writer.as_fd(); fds]).unwrap();
            let received = receive_bytes(&b, &mut bytes).unwrap();
            assert_eq!((received.len, received.truncated), (packet.len().min(3), packet.len() > 3));
            assert_eq!((received.lost_fds, received.fds.len()), (fds > 0, 0));
        }
        assert_eq!(bytes, *b"lon");
        drop(writer);
        // The reader sees the end of the pipe only if every copy of the writer is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn socket_that_accepts_no_fds_gets_bytes_only() {
        let (a, b) = pair();
        if let Err(error) = accept_fds(&b, false) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT), "{error}");
            return;
        }
        assert_eq!(send(&a, b"x", &[a.as_fd()]).unwrap_err().raw_os_error(), Some(libc::EPERM));
        send(&a, b"y", &[]).unwrap();
        send(&b, b"z", &[a.as_fd()]).unwrap();
        let mut bytes = [0; 3];
        let packet = receive(&b, &mut bytes).unwrap();
        assert_eq!((packet.len, bytes[0], packet.fds.len(), packet.lost_fds), (1, b'y', 0, false));
        assert_eq!(receive(&a, &mut bytes).unwrap().fds.len(), 1);
    }
}
