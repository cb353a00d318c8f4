//! Guest side of port forwarding: connects to a server in the pod for each forwarded connection.
//!
//! The shim accepts connections in the pod's network namespace on the node. For each connection, this module connects
//! to the same address in the pod's network namespace in the guest and relays the data.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::port_forwarding::{self, HEADER_LEN};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Sandbox, namespaces};
use crate::policy::Guard;
use crate::vsock::Listener;

/// Maximum number of concurrent connections.
const MAX_CONNECTIONS: usize = 1024;
/// Timeout for each of two steps: reading the header, and connecting.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Reply to a connection that the agent policy does not allow.
const REFUSED: u8 = (libc::EACCES & 0xff) as u8;

/// Accepts connections until the listener fails.
pub async fn serve(listener: Listener, sandbox: Arc<Sandbox>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => return tracing::error!("failed to accept a connection for port forwarding: {error}"),
        };
        let sandbox = Arc::clone(&sandbox);
        tokio::spawn(async move {
            if let Err(error) = forward_connection(stream, &sandbox.policy).await {
                tracing::debug!("failed to forward a connection: {error}");
            }
            drop(slot);
        });
    }
}

async fn forward_connection(stream: OwnedFd, policy: &Guard) -> io::Result<()> {
    // A `UnixStream` also works for this vsock socket. All stream sockets have the same calls for read, write and
    // shutdown, and no code asks for the socket's address.
    let mut host = UnixStream::from_std(stream.into())?;
    let mut header = [0; HEADER_LEN];
    timeout(TIMEOUT, host.read_exact(&mut header)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let address = port_forwarding::decode(header).map_err(io::Error::other)?;
    if let Err(refusal) = policy.check_port_forward(address) {
        host.write_all(&[REFUSED]).await?;
        return Err(io::Error::other(refusal));
    }
    match timeout(TIMEOUT, connect(address)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(mut server) => {
            host.write_all(&[0]).await?;
            tokio::io::copy_bidirectional(&mut host, &mut server).await.map(drop)
        }
        Err(error) => {
            let code =
                error.raw_os_error().and_then(|code| u8::try_from(code).ok()).unwrap_or((libc::EIO & 0xff) as u8);
            host.write_all(&[code]).await?;
            Err(error)
        }
    }
}

/// Connects to `address` in the pod. If `address` is 127.0.0.1 and the connection is refused, the fallback is `::1`.
///
/// 127.0.0.1 stands for localhost. The shim cannot know whether the server listens on 127.0.0.1 or on `::1`. A client
/// that connects to localhost uses the same order: it tries `::1` only after 127.0.0.1 has refused the connection.
async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    match connect_to(address).await {
        Err(error)
            if error.kind() == io::ErrorKind::ConnectionRefused && address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) =>
        {
            connect_to((Ipv6Addr::LOCALHOST, address.port()).into()).await.map_err(|_| error)
        }
        result => result,
    }
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = namespaces::run_in_pod(|| if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })
        .map_err(io::Error::other)??;
    socket.connect(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn forward_rejects_an_invalid_header() {
        let (mut dialled, accepted) = std::os::unix::net::UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        io::Write::write_all(&mut dialled, &[0; HEADER_LEN]).unwrap();
        assert!(forward_connection(accepted.into(), &Guard::default()).await.is_err());
    }

    #[tokio::test]
    async fn forward_refuses_a_connection_that_the_policy_forbids() {
        let policy = Guard::default();
        policy.accept(b"", br#"{"port_forward": false}"#).unwrap();
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut dialled, accepted) = std::os::unix::net::UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        let header = port_forwarding::encode(server.local_addr().unwrap());
        io::Write::write_all(&mut dialled, &header).unwrap();
        let error = forward_connection(accepted.into(), &policy).await.unwrap_err();
        assert!(error.to_string().contains("refused by the rule \"port_forward\" of the pod's policy"), "{error}");
        let mut reply = Vec::new();
        io::Read::read_to_end(&mut dialled, &mut reply).unwrap();
        assert_eq!(reply, [REFUSED]);
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
