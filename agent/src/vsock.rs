//! A vsock listener that accepts connections from the host only.
//!
//! Any process of a container can open AF_VSOCK sockets, because the address family is not confined to a network
//! namespace and needs no capability (net/vmw_vsock/af_vsock.c). Each listener therefore checks the CID of each peer.
//! The kernel takes the CID from the transport, so the peer cannot spoof it. In addition, the guest kernel has no vsock
//! loopback transport.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Once;
use std::time::Duration;

use husk_base::sys::vsock::{self, Peer};
use nix::sys::socket::SockFlag;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Retry delay of accept when the guest is out of fds or memory. No event reports that fds or memory are available
/// again.
pub const RETRY_DELAY: Duration = Duration::from_millis(100);

/// Returns whether accept failed because the guest is out of fds or memory.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS))
}

/// A listening vsock socket.
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    port: u32,
}

impl Listener {
    /// Listens on `port`.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = vsock::listen(port, SockFlag::SOCK_NONBLOCK)?;
        Ok(Self { socket: husk_base::async_fd::register(socket, Interest::READABLE)?, port })
    }

    /// Accepts the next connection from the host and closes connections from other peers. The returned socket is
    /// non-blocking and close-on-exec.
    ///
    /// Cancel safe: a connection is either returned or stays in the backlog.
    ///
    /// # Errors
    /// Returns errors of accept4(2). Retries if a connection was aborted or if the guest lacks fds or memory.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            match self.socket.async_io(Interest::READABLE, accept).await {
                Ok((stream, peer)) if is_host(&peer) => return Ok(stream),
                Ok((_, peer)) => log_rejected_peer(self.port, peer.cid),
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(error) if is_shortage(&error) => tokio::time::sleep(RETRY_DELAY).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Converts the listener to a stream of connections for a ttrpc server. An error of [`Listener::accept`]
    /// ends the stream.
    pub fn into_ttrpc(self) -> ttrpc::asynchronous::transport::Listener {
        let connections = futures::stream::try_unfold(self, |listener| async {
            loop {
                // A `UnixStream` also works for this vsock socket. All stream sockets have the same calls for read,
                // write and shutdown, and no code asks for the socket's address.
                match UnixStream::from_std(listener.accept().await?.into()) {
                    Ok(stream) => return Ok(Some((stream, listener))),
                    Err(error) => tracing::warn!("failed to register an API connection for async I/O: {error}"),
                }
            }
        });
        ttrpc::asynchronous::transport::Listener::new(connections)
    }
}

fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, Peer)> {
    vsock::accept(listener.as_fd(), SockFlag::SOCK_NONBLOCK)
}

/// Whether the peer is the host. Any other peer is a process of this guest, because the VMM forwards only connections
/// from the host.
fn is_host(peer: &Peer) -> bool {
    i32::from(peer.family) == libc::AF_VSOCK && peer.cid == libc::VMADDR_CID_HOST
}

/// Logs only the first rejected peer, because a container must not be able to fill the log.
fn log_rejected_peer(port: u32, cid: u32) {
    static REPORTED: Once = Once::new();
    REPORTED.call_once(|| {
        tracing::warn!(
            "rejected a connection to vsock port {port} from CID {cid}: only the host may connect (logged once)"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_host_accepts_only_the_host_cid() {
        let peer = |family: libc::c_int, cid| is_host(&Peer { family: family as libc::sa_family_t, cid, port: 0 });
        assert!(peer(libc::AF_VSOCK, libc::VMADDR_CID_HOST));
        for cid in [libc::VMADDR_CID_HYPERVISOR, libc::VMADDR_CID_LOCAL, 3, libc::VMADDR_CID_ANY] {
            assert!(!peer(libc::AF_VSOCK, cid), "CID {cid}");
        }
        assert!(!peer(libc::AF_UNIX, libc::VMADDR_CID_HOST));
        // If a peer has no address, the kernel leaves the address buffer unchanged.
        assert!(!is_host(&Peer { family: 0, cid: 0, port: 0 }));
    }
}
