//! Listens and connects on vsock(7). Each accepted connection comes with its peer's address.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen as listen_on, socket};

use super::new_fd;

/// Maximum number of connections that wait for accept.
const BACKLOG: i32 = 128;

/// Address of the peer of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Address family, or 0 if the peer has no address.
    pub family: libc::sa_family_t,
    /// CID, which the kernel takes from the transport.
    pub cid: u32,
    /// Port.
    pub port: u32,
}

/// Listens on `port`, for any CID of this system. The socket is close-on-exec. `flags` may add SOCK_NONBLOCK.
///
/// # Errors
/// The errors of socket(2), bind(2) and listen(2).
pub fn listen(port: u32, flags: SockFlag) -> io::Result<OwnedFd> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC | flags, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen_on(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Accepts a connection. The returned socket is close-on-exec. `flags` may add SOCK_NONBLOCK.
///
/// nix's `accept4` is not used, because it returns no address. getpeername(2) would fail if the connection has already
/// ended.
///
/// # Errors
/// The errors of accept4(2).
pub fn accept(listener: BorrowedFd<'_>, flags: SockFlag) -> io::Result<(OwnedFd, Peer)> {
    let mut address = *VsockAddr::new(0, 0).as_ref();
    address.svm_family = 0;
    let mut length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(io::Error::other)?;
    let flags = (SockFlag::SOCK_CLOEXEC | flags).bits();
    // SAFETY: the kernel writes at most `length` bytes to `address`, which has that size. Both outlive the call. The
    // call returns a new fd or -1.
    let connection = unsafe {
        new_fd(libc::accept4(listener.as_fd().as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags))
    }?;
    Ok((connection, Peer { family: address.svm_family, cid: address.svm_cid, port: address.svm_port }))
}

/// Connects to a port. The socket is close-on-exec.
///
/// # Errors
/// The errors of socket(2) and connect(2).
pub fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::connect(stream.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socket(AF_UNIX)")]
    fn accept_returns_the_address_family_of_a_unix_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let (_connection, peer) = accept(listener.as_fd(), SockFlag::SOCK_NONBLOCK).unwrap();
        assert_eq!(peer.family, libc::AF_UNIX as libc::sa_family_t);
        assert_eq!((peer.cid, peer.port), (0, 0));
    }
}
