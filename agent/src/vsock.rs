//! A vsock listener on the executor, yielding plain descriptors.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A listening vsock socket; it accepts from any context id, of which a guest sees only the host's.
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens on `port`.
    ///
    /// # Errors
    /// What the kernel says when the socket cannot be made, bound or listened on.
    pub fn bind(port: u32) -> io::Result<Self> {
        // SAFETY: socket takes no pointers; a non-negative result is a descriptor nobody else owns.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: sockaddr_vm is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address lives through the call and the length is its own.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: listen takes no pointers.
        if unsafe { libc::listen(socket.as_raw_fd(), 128) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket: crate::io::register(socket, Interest::READABLE)? })
    }

    /// The next connection, non-blocking and close-on-exec.
    ///
    /// # Errors
    /// What accept4(2) says.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                // SAFETY: null address pointers are allowed; a non-negative result is a descriptor nobody else owns.
                unsafe {
                    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
                    match libc::accept4(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) {
                        fd if fd < 0 => Err(io::Error::last_os_error()),
                        fd => Ok(OwnedFd::from_raw_fd(fd)),
                    }
                }
            })
            .await
    }

    /// Gives the socket to a ttrpc server.
    ///
    /// # Errors
    /// What the executor says when it cannot take the socket.
    pub fn into_ttrpc(self, server: ttrpc::asynchronous::Server) -> ttrpc::Result<ttrpc::asynchronous::Server> {
        let fd = self.socket.into_inner().into_raw_fd();
        // SAFETY: the descriptor is a listening vsock socket and its ownership goes to the server.
        unsafe { server.add_vsock_listener(fd) }
    }
}
