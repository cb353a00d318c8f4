//! Connections dialled within the pod's host-side network namespace, carried to the guest (see `crate::network::steer`).

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::{forward, ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use super::vmm::{Vmm, VmmError};
use crate::network::Steer;

/// Connections at once; more wait in the listener's backlog.
const MOST: usize = 512;
/// Most that a connection within the guest takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long nothing is accepted after an accept that failed: the first time, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Why a connection was not carried.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    /// No stream into the guest.
    #[error("connecting to the guest")]
    Guest(#[source] VmmError),
    /// Nobody listens there, or the guest cannot connect for another reason.
    #[error("connecting to {address} in the pod")]
    Refused {
        /// What was dialled.
        address: SocketAddr,
        /// What the guest's kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The guest did not answer.
    #[error("no answer from the guest within {PATIENCE:?}")]
    Silent,
    /// A stream broke.
    #[error("carrying data")]
    Stream(#[from] std::io::Error),
}

/// Accepts until the virtual machine ends, each listener in a task of its own.
pub fn serve(steer: Steer, vmm: &Vmm) {
    let slots = Arc::new(Semaphore::new(MOST));
    let Steer { listeners, link } = steer;
    let link = Arc::new(link);
    for listener in listeners {
        let (vmm, slots, link) = (vmm.clone(), Arc::clone(&slots), Arc::clone(&link));
        tokio::spawn(async move {
            let accepting = accept(listener, vmm.clone(), slots);
            tokio::select! {
                result = accepting => if let Err(error) = result {
                    tracing::warn!(%error, "connections within the pod's network namespace are no longer forwarded");
                },
                _ = vmm.wait() => {}
            }
            drop(link);
        });
    }
}

async fn accept(listener: std::net::TcpListener, vmm: Vmm, slots: Arc<Semaphore>) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut pause = PAUSES.0;
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return Ok(()) };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) if is_of_the_listener(&error) => return Err(error),
            Err(error) => {
                // No descriptors or no memory left for now, or something of that one connection's (accept(2)).
                tracing::warn!(%error, "a connection within the pod's network namespace was not accepted");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                continue;
            }
        };
        pause = PAUSES.0;
        let vmm = vmm.clone();
        tokio::spawn(async move {
            let carried = tokio::select! {
                result = carry(client, &vmm) => result,
                _ = vmm.wait() => Ok(()),
            };
            if let Err(error) = carried {
                tracing::debug!(error = %crate::chain(&error), "connection not forwarded");
            }
            drop(slot);
        });
    }
}

/// Whether the listener itself is no good: any other error is of a connection or of the moment.
fn is_of_the_listener(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT))
}

async fn carry(mut client: TcpStream, vmm: &Vmm) -> Result<(), ForwardError> {
    // The accepted connection's own address is what was dialled.
    let address = client.local_addr()?;
    // A reset, not an orderly end, is what a client is to see of a server that is not there.
    reset_at_close(&client, true)?;
    let mut guest = tokio::time::timeout(PATIENCE, dial(address, vmm)).await.map_err(|_| ForwardError::Silent)??;
    reset_at_close(&client, false)?;
    tokio::io::copy_bidirectional(&mut client, &mut guest).await?;
    Ok(())
}

/// A stream to whoever listens at `address` in the guest.
async fn dial(address: SocketAddr, vmm: &Vmm) -> Result<UnixStream, ForwardError> {
    let guest = vmm.connect(ports::FORWARD).await.map_err(ForwardError::Guest)?;
    guest.set_nonblocking(true)?;
    let mut guest = UnixStream::from_std(guest)?;
    guest.write_all(&forward::encode(address)).await?;
    match guest.read_u8().await? {
        0 => Ok(guest),
        code => Err(ForwardError::Refused { address, source: std::io::Error::from_raw_os_error(code.into()) }),
    }
}

/// SO_LINGER with no time, or none at all.
fn reset_at_close(client: &TcpStream, reset: bool) -> std::io::Result<()> {
    let linger = libc::linger { l_onoff: reset.into(), l_linger: 0 };
    let length = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the option lives through the call and the length is its own.
    let result = unsafe {
        libc::setsockopt(client.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
