//! The table of stdio streams that the host has connected and that no request has named yet.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::relay::Near;
use husk_base::sync::lock;
use husk_proto::stream::{AGENT_TOKEN, HEADER_LEN, Header};
use tokio::io::Interest;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout};

use crate::vsock::Listener;

/// Maximum number of connections that wait for a request. The same limit applies to connections that wait for a header.
const MAX_PENDING: usize = 256;
/// Timeout of a request that waits for its stream, and of a connection that waits for its header. Also the timeout of a
/// stream that the host has closed, and that waits for its request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Reason why a request does not get the stream that its token names.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The request's string is not a token.
    #[error("invalid stream token {0:?}: not a decimal number")]
    Token(String),
    /// The host did not connect the stream in time.
    #[error("timed out waiting for the host to connect stream {0}")]
    Missing(u64),
}

#[derive(Default)]
struct Table {
    ready: HashMap<u64, Ready>,
    awaited: HashMap<u64, oneshot::Sender<OwnedFd>>,
}

/// A stream that waits for its request. The host owns the stream, and closes it if there will be no request.
struct Ready {
    stream: OwnedFd,
    /// When the table saw that the host had closed the stream.
    closed: Option<Instant>,
}

impl Table {
    /// Removes the streams that the host closed some time ago. Their requests could still arrive until then, because the
    /// host sends a request after its streams, and closes a stdin stream that has ended.
    fn remove_closed(&mut self) {
        let now = Instant::now();
        self.ready.retain(|_, ready| {
            if ready.closed.is_none() && Near::Relay.is_gone(ready.stream.as_fd()) {
                ready.closed = Some(now);
            }
            ready.closed.is_none_or(|closed| now.saturating_duration_since(closed) < TIMEOUT)
        });
    }
}

/// A token for which the agent waits. If dropped, the agent does not wait any longer.
struct Awaited<'a> {
    streams: &'a Streams,
    token: u64,
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        lock(&self.streams.table).awaited.remove(&self.token);
    }
}

/// Handle to the table of streams. Clones share the same table.
#[derive(Clone, Default)]
pub struct Streams {
    table: Arc<Mutex<Table>>,
}

impl Streams {
    /// Accepts streams until the listener fails.
    pub async fn serve(self, listener: Listener) {
        let listener = Arc::new(listener);
        let accept = || {
            let listener = Arc::clone(&listener);
            async move { listener.accept().await }
        };
        self.serve_connections(accept).await;
    }

    /// Calls `accept` for each stream until it fails. Does not call `accept` while `MAX_PENDING` connections wait for
    /// their header.
    async fn serve_connections<F>(self, mut accept: impl FnMut() -> F)
    where
        F: Future<Output = io::Result<OwnedFd>>,
    {
        let slots = Arc::new(Semaphore::new(MAX_PENDING));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let stream = match accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::error!("failed to accept a connection to the stream port: {error}");
                    return;
                }
            };
            let this = self.clone();
            tokio::spawn(async move {
                match timeout(TIMEOUT, read_header(stream)).await {
                    Ok(Ok((header, stream))) => this.insert(header.token, stream),
                    Ok(Err(error)) => tracing::warn!("rejected a stream: failed to read its header: {error}"),
                    Err(_) => tracing::warn!("rejected a stream: timed out waiting for its header"),
                }
                drop(slot);
            });
        }
    }

    /// Adds a stream. Rejects the stream if too many streams already wait for a request, or if the agent has chosen the
    /// token and does not wait for the stream any longer.
    pub fn insert(&self, token: u64, stream: OwnedFd) {
        let mut table = lock(&self.table);
        table.remove_closed();
        if let Some(waiter) = table.awaited.remove(&token) {
            let _ = waiter.send(stream);
        } else if token & AGENT_TOKEN != 0 {
            tracing::debug!("closed a stream for which the agent does not wait any longer");
        } else if table.ready.len() >= MAX_PENDING {
            tracing::warn!("rejected stream {token}: {MAX_PENDING} streams already wait for a request");
        } else {
            table.ready.insert(token, Ready { stream, closed: None });
        }
    }

    /// Takes the stream that `token` names. Waits if the host has not connected the stream yet. Returns `None` for an
    /// empty string.
    pub async fn take(&self, token: &str) -> Result<Option<OwnedFd>, StreamError> {
        if token.is_empty() {
            return Ok(None);
        }
        let number: u64 = token.parse().map_err(|_| StreamError::Token(token.to_owned()))?;
        let waiter = {
            let mut table = lock(&self.table);
            if let Some(ready) = table.ready.remove(&number) {
                return Ok(Some(ready.stream));
            }
            let (sender, receiver) = oneshot::channel();
            table.awaited.insert(number, sender);
            receiver
        };
        let _awaited = Awaited { streams: self, token: number };
        match timeout(TIMEOUT, waiter).await {
            Ok(Ok(stream)) => Ok(Some(stream)),
            _ => Err(StreamError::Missing(number)),
        }
    }
}

async fn read_header(stream: OwnedFd) -> io::Result<(Header, OwnedFd)> {
    let stream = husk_base::async_fd::register(File::from(stream), Interest::READABLE)?;
    let mut bytes = [0; HEADER_LEN];
    let mut filled = 0;
    while let Some(unread) = bytes.get_mut(filled..).filter(|unread| !unread.is_empty()) {
        match stream.async_io(Interest::READABLE, |mut file| file.read(unread)).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => filled += read,
        }
    }
    let header = Header::decode(bytes).map_err(io::Error::other)?;
    Ok((header, stream.into_inner().into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn take_returns_streams_that_connect_before_or_after_the_call() {
        let streams = Streams::default();
        let (mut dialled, accepted) = UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        dialled.write_all(&Header { token: 7 }.encode()).unwrap();
        dialled.write_all(b"rest").unwrap();
        let (header, stream) = read_header(accepted.into()).await.unwrap();
        streams.insert(header.token, stream);
        let mut text = [0; 4];
        let taken = streams.take("7").await.unwrap().unwrap();
        File::from(taken).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"rest");

        let later = streams.clone();
        let waiting = tokio::spawn(async move { later.take("8").await });
        tokio::task::yield_now().await;
        streams.insert(8, dialled.into());
        assert!(waiting.await.unwrap().unwrap().is_some());
        assert!(streams.take("").await.unwrap().is_none());
        assert!(matches!(streams.take("x").await, Err(StreamError::Token(_))));
    }

    #[tokio::test]
    async fn serve_accepts_no_more_than_the_maximum_of_silent_connections() {
        let (sender, mut accepted) = tokio::sync::mpsc::unbounded_channel();
        let accept = move || {
            let (near, far) = UnixStream::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            sender.send(near).unwrap();
            std::future::ready(Ok(far.into()))
        };
        let server = tokio::spawn(Streams::default().serve_connections(accept));
        let mut silent = Vec::new();
        for _ in 0..MAX_PENDING {
            silent.push(accepted.recv().await.unwrap());
        }
        tokio::task::yield_now().await;
        assert!(accepted.try_recv().is_err(), "more than {MAX_PENDING} silent connections were accepted");
        drop(silent.pop());
        assert!(accepted.recv().await.is_some());
        server.abort();
    }

    #[tokio::test]
    async fn insert_closes_a_stream_whose_waiter_has_gone() {
        let streams = Streams::default();
        let token = AGENT_TOKEN | 7;
        {
            let text = token.to_string();
            let mut waiting = std::pin::pin!(streams.take(&text));
            assert!(futures::poll!(&mut waiting).is_pending());
            assert_eq!(lock(&streams.table).awaited.len(), 1);
        }
        assert!(lock(&streams.table).awaited.is_empty());
        let (mut host, guest) = UnixStream::pair().unwrap();
        streams.insert(token, guest.into());
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "the stream is open");
        assert!(lock(&streams.table).ready.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn stream_that_the_host_closes_waits_for_its_request_for_a_limited_time() {
        let streams = Streams::default();
        let open = |token| {
            let (host, guest) = UnixStream::pair().unwrap();
            streams.insert(token, guest.into());
            host
        };
        let (mut stdin, _stdout, leaked) = (open(1), open(2), open(3));
        stdin.write_all(b"input").unwrap();
        drop((stdin, leaked));
        let _next = open(4);
        tokio::time::sleep(TIMEOUT / 2).await;
        let _next = open(5);
        let taken = streams.take("1").await.unwrap().unwrap();
        let mut text = String::new();
        File::from(taken).read_to_string(&mut text).unwrap();
        assert_eq!(text, "input");
        tokio::time::sleep(TIMEOUT / 2).await;
        let _next = open(6);
        let table = lock(&streams.table);
        assert!(!table.ready.contains_key(&3));
        assert!(table.ready.contains_key(&2), "the host owns a stream that it keeps open");
    }

    #[test]
    fn insert_rejects_streams_that_exceed_the_limit() {
        let streams = Streams::default();
        let mut hosts = Vec::new();
        for token in 0..=MAX_PENDING as u64 {
            let (host, guest) = UnixStream::pair().unwrap();
            streams.insert(token, guest.into());
            hosts.push(host);
        }
        let ready = &lock(&streams.table).ready;
        assert_eq!(ready.len(), MAX_PENDING);
        assert!(!ready.contains_key(&(MAX_PENDING as u64)), "the last stream replaced an earlier stream");
    }

    #[tokio::test]
    async fn read_header_rejects_invalid_bytes() {
        let (mut dialled, accepted) = UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        dialled.write_all(&[0; HEADER_LEN]).unwrap();
        assert!(read_header(accepted.into()).await.is_err());
    }
}
