//! Port forwarding: host processes open connections in the pod's network namespace, and the shim forwards these
//! connections to the guest.
//!
//! `crate::network::sk_lookup` directs the connections to the shim's listeners.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::{port_forwarding, ports};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use crate::network::PortForwarding;
use crate::vm::vmm::{Vmm, VmmError};

/// Maximum number of concurrent connections. Further connections wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 512;
/// Timeout for connecting to a listener in the guest.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// First and maximum backoff after a failed accept.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Why forwarding a connection failed.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    /// The vsock connection to the guest could not be opened.
    #[error("failed to connect to the guest")]
    Guest(#[source] VmmError),
    /// The guest could not connect, usually because nothing listens on the address.
    #[error("failed to connect to {address} in the pod")]
    Refused {
        /// Address that the client dialled.
        address: SocketAddr,
        /// Error from the guest's kernel.
        #[source]
        source: std::io::Error,
    },
    /// The guest did not answer before the timeout.
    #[error("the guest did not answer within {CONNECT_TIMEOUT:?}")]
    Timeout,
    /// The client's connection or the vsock connection to the guest failed.
    #[error("failed to copy data between client and guest")]
    Stream(#[from] std::io::Error),
}

/// Accepts connections until the VM ends. Each listener has its own task.
pub fn serve(forwarding: PortForwarding, vmm: &Vmm) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let PortForwarding { listeners, link } = forwarding;
    let link = Arc::new(link);
    for listener in listeners {
        let (vmm, slots, link) = (vmm.clone(), Arc::clone(&slots), Arc::clone(&link));
        tokio::spawn(async move {
            let accepting = accept(listener, vmm.clone(), slots);
            tokio::select! {
                result = accepting => if let Err(error) = result {
                    tracing::warn!(
                        %error,
                        "a listener for port forwarding in the pod's network namespace failed"
                    );
                },
                _ = vmm.wait() => {}
            }
            drop(link);
        });
    }
}

async fn accept(listener: std::net::TcpListener, vmm: Vmm, slots: Arc<Semaphore>) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return Ok(()) };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) if is_listener_error(&error) => return Err(error),
            Err(error) => {
                // The shim is temporarily out of fds or memory, or only this connection has failed (accept(2)).
                tracing::warn!(%error, "failed to accept a connection in the pod's network namespace; retrying");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
                continue;
            }
        };
        backoff = ACCEPT_BACKOFF.0;
        let vmm = vmm.clone();
        tokio::spawn(async move {
            let forwarded = tokio::select! {
                result = forward_connection(client, &vmm) => result,
                _ = vmm.wait() => Ok(()),
            };
            if let Err(error) = forwarded {
                tracing::debug!(error = %crate::chain(&error), "failed to forward a connection");
            }
            drop(slot);
        });
    }
}

/// Returns whether the listener itself is broken. Any other error concerns one connection or is temporary.
fn is_listener_error(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT))
}

async fn forward_connection(mut client: TcpStream, vmm: &Vmm) -> Result<(), ForwardError> {
    // The local address of an accepted connection is the address that the client dialled.
    let address = client.local_addr()?;
    // If nothing listens in the guest, the client must see a reset instead of an orderly close.
    reset_at_close(&client, true)?;
    let mut guest =
        tokio::time::timeout(CONNECT_TIMEOUT, dial(address, vmm)).await.map_err(|_| ForwardError::Timeout)??;
    reset_at_close(&client, false)?;
    tokio::io::copy_bidirectional(&mut client, &mut guest).await?;
    Ok(())
}

/// Connects to the listener at `address` in the guest.
async fn dial(address: SocketAddr, vmm: &Vmm) -> Result<UnixStream, ForwardError> {
    let guest = vmm.connect(ports::PORT_FORWARDING).await.map_err(ForwardError::Guest)?;
    guest.set_nonblocking(true)?;
    let mut guest = UnixStream::from_std(guest)?;
    guest.write_all(&port_forwarding::encode(address)).await?;
    match guest.read_u8().await? {
        0 => Ok(guest),
        code => Err(ForwardError::Refused { address, source: std::io::Error::from_raw_os_error(code.into()) }),
    }
}

/// If `reset` is true, sets SO_LINGER with a timeout of zero, so that close(2) sends a reset. Otherwise, turns off
/// SO_LINGER.
fn reset_at_close(client: &TcpStream, reset: bool) -> std::io::Result<()> {
    let linger = libc::linger { l_onoff: reset.into(), l_linger: 0 };
    Ok(setsockopt(client, sockopt::Linger, &linger)?)
}
