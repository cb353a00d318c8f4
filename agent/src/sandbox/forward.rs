//! Connections that were dialled on the host within the pod's network namespace, made again in the guest's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::forward::{self, HEADER_LEN};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::namespaces;
use crate::vsock::Listener;

/// Connections at once.
const MOST: usize = 1024;
/// How long the header and the connection may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Accepts for ever.
pub async fn serve(listener: Listener) {
    let slots = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => return tracing::error!("forward port: {error}"),
        };
        tokio::spawn(async move {
            if let Err(error) = carry(stream).await {
                tracing::debug!("forwarded connection: {error}");
            }
            drop(slot);
        });
    }
}

async fn carry(stream: OwnedFd) -> io::Result<()> {
    // Reading, writing and shutting down are the same for every stream socket; nothing here asks for its name.
    let mut host = UnixStream::from_std(stream.into())?;
    let mut header = [0; HEADER_LEN];
    timeout(PATIENCE, host.read_exact(&mut header)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let address = forward::decode(header).map_err(io::Error::other)?;
    match timeout(PATIENCE, connect(address)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(mut server) => {
            host.write_all(&[0]).await?;
            tokio::io::copy_bidirectional(&mut host, &mut server).await.map(drop)
        }
        Err(error) => {
            let code = error.raw_os_error().and_then(|code| u8::try_from(code).ok()).unwrap_or(libc::EIO as u8);
            host.write_all(&[code]).await?;
            Err(error)
        }
    }
}

/// Connects in the pod. Whoever dials 127.0.0.1 means localhost: the host's end cannot know whether the server listens
/// on the other one, and would try that only after a refusal.
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
    let socket = namespaces::within(|| if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })
        .map_err(io::Error::other)??;
    socket.connect(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_header_is_refused() {
        let (mut dialled, accepted) = std::os::unix::net::UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        io::Write::write_all(&mut dialled, &[0; HEADER_LEN]).unwrap();
        assert!(carry(accepted.into()).await.is_err());
    }
}
