//! The relay of connections to Unix sockets of the host, which a patch adds to the guest's kernel
//! (`guest/kernel/patches/0006-unix-relay-host-sockets.patch`). Also reads the groups of a peer.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use libc::{c_int, c_ulong};
use nix::sys::socket::{SockFlag, accept4};

/// SIOCUNIXRELAY and SIOCUNIXRELAYTARGET of include/net/af_unix.h.
const SIOCUNIXRELAY: c_ulong = 0x89e1;
const SIOCUNIXRELAYTARGET: c_ulong = 0x89e2;

/// `struct unix_relay_target` of include/net/af_unix.h.
#[repr(C)]
struct RawTarget {
    device: u32,
    mount: c_int,
    path: [u8; libc::PATH_MAX as usize],
}

/// The socket to which a client wants to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Major and minor device number of the file system, as in proc_pid_mountinfo(5).
    pub device: (u32, u32),
    /// Path from the root of the given mount, or of the file system. Begins with a slash.
    pub path: PathBuf,
}

/// Makes `listener` the relay of this kernel.
///
/// # Errors
/// EFAULT if the kernel lacks the patch, EPERM without CAP_SYS_ADMIN, and EBUSY if there is a relay.
pub fn register(listener: BorrowedFd<'_>) -> io::Result<()> {
    ioctl(listener, SIOCUNIXRELAY, 0)
}

/// Accepts a connection of the relay. The new fd is non-blocking. The accept of the standard library asks for the address
/// of the peer, and fails, because there is no peer before the answer.
///
/// # Errors
/// The errors of accept4(2).
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 has returned a new fd, which nothing else owns.
    unsafe { super::new_fd(fd) }
}

/// Ends the client's connect(2), which fails with the error `errno`, or succeeds if `errno` is 0. Until an answer of 0,
/// neither `connection` nor the client's socket is connected.
///
/// # Errors
/// ENOTCONN if there was an answer, if the client has gone, or if the client's socket has been connected in another way.
/// Then there is no connection.
pub fn answer(connection: BorrowedFd<'_>, errno: u8) -> io::Result<()> {
    ioctl(connection, SIOCUNIXRELAY, errno.into())
}

fn ioctl(socket: BorrowedFd<'_>, request: c_ulong, value: c_ulong) -> io::Result<()> {
    // SAFETY: the request takes a number and no pointer.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request, value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Returns the socket to which the client of an accepted connection wants to connect. `mount` is the root of a mount.
/// With `None`, the path begins at a root of the file system. A file system can have several roots.
///
/// # Errors
/// ENOENT if the connection was not relayed, or the socket is not below `mount`, and the errors of ioctl(2).
pub fn target(connection: BorrowedFd<'_>, mount: Option<BorrowedFd<'_>>) -> io::Result<Target> {
    let mount = mount.map_or(-1, |mount| mount.as_raw_fd());
    let mut raw = Box::new(RawTarget { device: 0, mount, path: [0; libc::PATH_MAX as usize] });
    // SAFETY: the kernel writes at most one `struct unix_relay_target`, which `raw` is. It outlives the call.
    if unsafe { libc::ioctl(connection.as_raw_fd(), SIOCUNIXRELAYTARGET, &raw mut *raw) } == -1 {
        return Err(io::Error::last_os_error());
    }
    parse(&raw)
}

fn parse(raw: &RawTarget) -> io::Result<Target> {
    let path = CStr::from_bytes_until_nul(&raw.path).map_err(io::Error::other)?;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path.to_bytes()));
    // `new_encode_dev` of include/linux/kdev_t.h.
    let device = ((raw.device & 0xf_ff00) >> 8, (raw.device & 0xff) | ((raw.device >> 12) & 0xf_ff00));
    Ok(Target { device, path })
}

/// Returns the supplementary groups of the peer of a Unix socket (SO_PEERGROUPS in unix(7)).
///
/// # Errors
/// ERANGE if the peer has more than `max` groups, and the other errors of getsockopt(2).
pub fn peer_groups(socket: impl AsFd, max: usize) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; max];
    let mut len = libc::socklen_t::try_from(size_of_val(&*groups)).map_err(io::Error::other)?;
    let (socket, level) = (socket.as_fd().as_raw_fd(), libc::SOL_SOCKET);
    // SAFETY: the kernel writes at most `len` bytes to the vector, which has this size. Both outlive the call.
    let result: c_int =
        unsafe { libc::getsockopt(socket, level, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(usize::try_from(len).unwrap_or_default() / size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn parse_decodes_device_and_path() {
        let mut raw = RawTarget { device: 0, mount: -1, path: [0; libc::PATH_MAX as usize] };
        // 0:300 and 259:3.
        for (device, expected) in [(0x10002c, (0, 300)), (0x10303, (259, 3))] {
            raw.device = device;
            raw.path[..3].copy_from_slice(b"/a\0");
            assert_eq!(parse(&raw).unwrap(), Target { device: expected, path: "/a".into() });
        }
        raw.path.fill(b'a');
        assert!(parse(&raw).is_err());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socket(AF_UNIX)")]
    fn kernel_without_the_relay_refuses_the_requests() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        register(listener.as_fd()).unwrap_err();
        let (connection, _peer) = UnixStream::pair().unwrap();
        answer(connection.as_fd(), 0).unwrap_err();
        target(connection.as_fd(), None).unwrap_err();
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no getsockopt(SO_PEERGROUPS)")]
    fn peer_groups_returns_the_groups_of_the_peer() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let own: Vec<u32> = nix::unistd::getgroups().unwrap().into_iter().map(nix::unistd::Gid::as_raw).collect();
        assert_eq!(peer_groups(&socket, 1024).unwrap(), own);
        let (socket, peer) = UnixStream::pair().unwrap();
        drop(peer);
        assert_eq!(peer_groups(&socket, own.len()).unwrap(), own);
    }
}
