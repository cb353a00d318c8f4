//! A vsock listener that accepts connections from the host only.
//!
//! Every process of a container may open AF_VSOCK sockets: the address family has no network namespaces and asks for no
//! capability (net/vmw_vsock/af_vsock.c). So each listener looks at its peer's context id, which the kernel fills in
//! from the transport, not from what the peer says. The guest kernel has no loopback transport either.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Once;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Delay before accept is retried when the guest is out of descriptors or memory: no event tells when there are some.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// A listening vsock socket.
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    port: u32,
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
        let mut address = unspecified();
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
        Ok(Self { socket: crate::io::register(socket, Interest::READABLE)?, port })
    }

    /// The next connection from the host, non-blocking and close-on-exec. Connections of other peers are closed.
    ///
    /// Cancel safe: a connection is either returned or still waits in the backlog.
    ///
    /// # Errors
    /// What accept4(2) says, other than an aborted connection or a lack of resources: those are retried.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            match self.socket.async_io(Interest::READABLE, accept).await {
                Ok((stream, peer)) if is_host(&peer) => return Ok(stream),
                Ok((_, peer)) => report_refusal(self.port, peer.svm_cid),
                Err(error) => match error.raw_os_error() {
                    Some(libc::ECONNABORTED) => {}
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        tokio::time::sleep(RETRY_DELAY).await;
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// The connections from the host, for a ttrpc server. An error of [`Listener::accept`] ends the stream.
    pub fn into_ttrpc(self) -> ttrpc::asynchronous::transport::Listener {
        let connections = futures::stream::try_unfold(self, |listener| async {
            loop {
                // Reading, writing and shutting down are the same for every stream socket; nothing asks for its name.
                match UnixStream::from_std(listener.accept().await?.into()) {
                    Ok(stream) => return Ok(Some((stream, listener))),
                    Err(error) => tracing::warn!("failed to register a connection to the API: {error}"),
                }
            }
        });
        ttrpc::asynchronous::transport::Listener::new(connections)
    }
}

fn unspecified() -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain data for which all zeroes is valid.
    unsafe { std::mem::zeroed() }
}

fn accept(socket: &OwnedFd) -> io::Result<(OwnedFd, libc::sockaddr_vm)> {
    let mut peer = unspecified();
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the address lives through the call and the length is its own; a non-negative result is a descriptor that
    // nobody else owns.
    unsafe {
        match libc::accept4(socket.as_raw_fd(), (&raw mut peer).cast(), &raw mut length, flags) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok((OwnedFd::from_raw_fd(fd), peer)),
        }
    }
}

/// Whether a peer is the host. Anything else is a process of this guest: the VMM connects the host and nobody else.
fn is_host(peer: &libc::sockaddr_vm) -> bool {
    peer.svm_family == libc::AF_VSOCK as libc::sa_family_t && peer.svm_cid == libc::VMADDR_CID_HOST
}

/// Logs a refused peer, once: a container must not be able to fill the log.
fn report_refusal(port: u32, cid: u32) {
    static REPORTED: Once = Once::new();
    REPORTED.call_once(|| {
        tracing::warn!(
            "refused a connection to vsock port {port} from CID {cid}: only the host may connect (logged once)"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_is_a_peer() {
        let peer = |family: libc::c_int, cid| {
            is_host(&libc::sockaddr_vm { svm_family: family as libc::sa_family_t, svm_cid: cid, ..unspecified() })
        };
        assert!(peer(libc::AF_VSOCK, libc::VMADDR_CID_HOST));
        for cid in [libc::VMADDR_CID_HYPERVISOR, libc::VMADDR_CID_LOCAL, 3, libc::VMADDR_CID_ANY] {
            assert!(!peer(libc::AF_VSOCK, cid), "CID {cid}");
        }
        assert!(!peer(libc::AF_UNIX, libc::VMADDR_CID_HOST));
        // What an unnamed peer leaves behind.
        assert!(!is_host(&unspecified()));
    }
}
