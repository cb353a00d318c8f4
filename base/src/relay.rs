//! Relays the data of a client to a server that the client cannot reach, and back.
//!
//! A connection can have several relays in a row. Each relay has a socket towards the client (near), and a socket
//! towards the server (far). A half-close in one direction does not end the other direction. A relay whose client has
//! gone shuts down the receive direction of its far socket, by which the next relay learns this.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::time::timeout;

use crate::async_fd::register;

/// Size of the buffer for each direction, in bytes.
const BUFFER: usize = 8 << 10;
/// How long the server may take to read the rest of the data after the client has gone.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// What is at the other end of the near socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Near {
    /// The client itself.
    Client,
    /// Another relay, which shuts down its receive direction when the client has gone.
    Relay,
}

impl Near {
    /// Returns whether the client has gone, which is final. A client that has only half-closed its socket has not gone.
    pub fn is_gone(self, socket: BorrowedFd<'_>) -> bool {
        match self {
            Self::Client => {
                let mut fds = [PollFd::new(socket, PollFlags::empty())];
                let _ = poll(&mut fds, PollTimeout::ZERO);
                fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
            }
            // An empty message sends nothing, but fails if the peer does not receive any more. POLLHUP comes only
            // later, when the peer has also sent everything.
            Self::Relay => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                !matches!(send(socket.as_raw_fd(), &[], flags), Ok(_) | Err(Errno::EAGAIN | Errno::EINTR))
            }
        }
    }
}

/// Waits until the client of a socket has gone.
#[derive(Debug)]
pub struct Departure {
    /// A copy of the socket. Its readiness is separate from that of the original, which readers and writers use.
    socket: AsyncFd<OwnedFd>,
    interest: Interest,
    near: Near,
    /// Whether this process has shut down the send direction of the socket.
    half_closed: AtomicBool,
}

impl Departure {
    /// Watches a Unix socket.
    ///
    /// # Errors
    /// If the socket cannot be duplicated or registered with the async runtime.
    pub fn watch(socket: impl AsFd, near: Near) -> io::Result<Self> {
        let interest = match near {
            // POLLHUP always counts. With this interest, hardly any other event wakes up the task.
            Near::Client => Interest::PRIORITY,
            // Each shutdown of the peer wakes up a poll for writing (`unix_shutdown` in net/unix/af_unix.c). After a
            // half-close, the runtime would count the socket as readable all the time.
            Near::Relay => Interest::WRITABLE,
        };
        let socket = register(socket.as_fd().try_clone_to_owned()?, interest)?;
        Ok(Self { socket, interest, near, half_closed: AtomicBool::new(false) })
    }

    /// Returns when the client has gone. Cancel safe.
    ///
    /// # Errors
    /// If the async runtime ends.
    pub async fn wait(&self) -> io::Result<()> {
        let check = |socket: &OwnedFd| {
            // A send fails now in any case. POLLHUP still says that the peer has sent everything.
            let near = if self.half_closed.load(Ordering::Relaxed) { Near::Client } else { self.near };
            if near.is_gone(socket.as_fd()) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        };
        self.socket.async_io(self.interest, check).await
    }
}

/// Copies data in both directions until both have ended, or until the client has gone. Data that the client has sent
/// before may still arrive for at most 30 s.
///
/// # Errors
/// If the client cannot be watched.
pub async fn relay(mut near: UnixStream, mut far: UnixStream, kind: Near) -> io::Result<()> {
    let departure = Departure::watch(&near, kind)?;
    let far_copy = far.as_fd().try_clone_to_owned()?;
    let ((from_client, to_client), (from_server, to_server)) = (near.split(), far.split());
    let mut forward = pin!(copy(from_client, to_server));
    let mut back = pin!(copy(from_server, to_client));
    let mut gone = pin!(departure.wait());
    let (mut forwarded, mut returned) = (false, false);
    while !(forwarded && returned) {
        tokio::select! {
            _ = &mut forward, if !forwarded => forwarded = true,
            half_closed = &mut back, if !returned => {
                returned = true;
                departure.half_closed.store(half_closed, Ordering::Relaxed);
            }
            _ = &mut gone => {
                let _ = shutdown(far_copy.as_raw_fd(), Shutdown::Read);
                if !forwarded {
                    let _ = timeout(LINGER_TIMEOUT, forward).await;
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Copies data until the end of `from`, or until `to` receives no more. Passes the end on. The other direction of the
/// two sockets continues, because it can still have data. Returns whether the send direction of `to` was shut down.
async fn copy(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> bool {
    let mut buffer = vec![0; BUFFER];
    loop {
        let data = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                let _ = to.shutdown().await;
                return true;
            }
            Ok(read) => buffer.get(..read).unwrap_or_default(),
        };
        if to.write_all(data).await.is_err() {
            let _ = shutdown(from.as_ref().as_raw_fd(), Shutdown::Read);
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client and a server with two relays between them, and the task of the relays.
    fn connect() -> (UnixStream, UnixStream, tokio::task::JoinHandle<()>) {
        let pair = || UnixStream::pair().unwrap();
        let ((client, near), (middle, next), (far, server)) = (pair(), pair(), pair());
        let relays = async move {
            let (first, second) =
                tokio::join!(relay(near, middle, Near::Client), async { relay(next, far, Near::Relay).await });
            first.unwrap();
            second.unwrap();
        };
        (client, server, tokio::spawn(relays))
    }

    async fn all(stream: &mut UnixStream) -> Vec<u8> {
        let mut data = Vec::new();
        stream.read_to_end(&mut data).await.unwrap();
        data
    }

    /// Writes until nothing more fits. The clock of the test is paused, and advances when nothing else can run.
    async fn fill(stream: &mut UnixStream) -> usize {
        let mut written = 0;
        while let Ok(count) = timeout(Duration::from_secs(1), stream.write(&[7; 1 << 16])).await {
            written += count.unwrap();
        }
        written
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn half_close_of_either_side_leaves_the_other_direction_open() {
        for client_first in [true, false] {
            let (client, server, relays) = connect();
            let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
            first.write_all(b"question").await.unwrap();
            first.shutdown().await.unwrap();
            assert_eq!(all(&mut second).await, b"question");
            // The half-closed side has not gone.
            tokio::time::sleep(LINGER_TIMEOUT * 2).await;
            second.write_all(b"answer").await.unwrap();
            second.shutdown().await.unwrap();
            assert_eq!(all(&mut first).await, b"answer");
            relays.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn client_that_has_gone_ends_the_connection_to_a_server_that_ignores_it() {
        let (mut client, mut server, relays) = connect();
        client.write_all(b"last words").await.unwrap();
        drop(client);
        // The server has not closed its socket.
        let begin = tokio::time::Instant::now();
        relays.await.unwrap();
        assert_eq!(begin.elapsed(), Duration::ZERO, "the end waited for a timeout");
        assert_eq!(all(&mut server).await, b"last words");
        server.write_all(b"x").await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn server_that_does_not_read_keeps_no_connection_of_a_client_that_has_gone() {
        let (mut client, mut server, relays) = connect();
        let written = fill(&mut client).await;
        drop(client);
        let begin = tokio::time::Instant::now();
        relays.await.unwrap();
        assert_eq!(begin.elapsed().as_secs(), LINGER_TIMEOUT.as_secs());
        let received = all(&mut server).await.len();
        assert!(received > 0 && received < written, "{received} of {written}");
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn slow_server_gets_everything_that_a_client_has_sent() {
        let (mut client, mut server, relays) = connect();
        let written = fill(&mut client).await;
        drop(client);
        assert_eq!(all(&mut server).await.len(), written);
        relays.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn large_data_passes_in_both_directions_at_the_same_time() {
        let (mut client, mut server, relays) = connect();
        let echo = async move {
            let (mut from, mut to) = server.split();
            tokio::io::copy(&mut from, &mut to).await.unwrap();
            to.write_all(b"end").await.unwrap();
        };
        let data: Vec<u8> = (0..(16_u32 << 20) + 3).map(|number| (number % 251) as u8).collect();
        let sent = data.clone();
        let exchange = async move {
            let (mut from, mut to) = client.split();
            let send = async {
                to.write_all(&sent).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let (_, read) = tokio::join!(send, from.read_to_end(&mut received));
            read.unwrap();
            received
        };
        let (received, ()) = tokio::join!(exchange, echo);
        assert!(received == [&data[..], b"end"].concat());
        relays.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    #[cfg_attr(miri, ignore = "Miri has no shutdown")]
    async fn client_gets_the_answer_of_a_server_that_has_closed_its_socket() {
        let (mut client, mut server, relays) = connect();
        server.write_all(b"too many requests").await.unwrap();
        drop(server);
        // The relay cannot deliver this.
        while client.write_all(&[7; 1 << 10]).await.is_ok() {}
        // After the answer, the client can see ECONNRESET, because the server has not read everything.
        let mut answer = [0; 17];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"too many requests");
        drop(client);
        relays.await.unwrap();
    }
}
