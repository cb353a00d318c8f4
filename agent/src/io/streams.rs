//! The table of stdio streams that have been dialled and not yet been named by a request.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_proto::stream::{HEADER_LEN, Header};
use tokio::io::Interest;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::vsock::Listener;

/// Connections that wait for their request, or for their header, at most.
const PENDING: usize = 256;
/// How long a request waits for a stream it names, and a connection for its header.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a request does not get the stream it names.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The string in the request is no token.
    #[error("{0:?} is not a stream token")]
    Token(String),
    /// Nobody dialled the stream in time.
    #[error("stream {0} has not been opened")]
    Missing(u64),
}

#[derive(Default)]
struct Table {
    ready: HashMap<u64, OwnedFd>,
    awaited: HashMap<u64, oneshot::Sender<OwnedFd>>,
}

/// The handle to the table; cloning it clones the handle.
#[derive(Clone, Default)]
pub struct Streams {
    table: Arc<Mutex<Table>>,
}

impl Streams {
    /// Accepts streams for ever.
    pub async fn serve(self, listener: Listener) {
        let slots = Arc::new(Semaphore::new(PENDING));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::error!("stream port: {error}");
                    return;
                }
            };
            let this = self.clone();
            tokio::spawn(async move {
                match timeout(PATIENCE, read_header(stream)).await {
                    Ok(Ok((header, stream))) => this.insert(header.token, stream),
                    Ok(Err(error)) => tracing::warn!("stream refused: {error}"),
                    Err(_) => tracing::warn!("stream refused: no header in time"),
                }
                drop(slot);
            });
        }
    }

    fn insert(&self, token: u64, stream: OwnedFd) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        match table.awaited.remove(&token) {
            Some(waiter) => {
                let _ = waiter.send(stream);
            }
            None if table.ready.len() < PENDING => {
                table.ready.insert(token, stream);
            }
            None => tracing::warn!("stream {token} refused: too many wait for a request"),
        }
    }

    /// The stream that `token` names; nothing for an empty string.
    ///
    /// # Errors
    /// [`StreamError`] when it is no token or the stream does not come.
    pub async fn take(&self, token: &str) -> Result<Option<OwnedFd>, StreamError> {
        if token.is_empty() {
            return Ok(None);
        }
        let number: u64 = token.parse().map_err(|_| StreamError::Token(token.to_owned()))?;
        let waiter = {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(stream) = table.ready.remove(&number) {
                return Ok(Some(stream));
            }
            let (sender, receiver) = oneshot::channel();
            table.awaited.insert(number, sender);
            receiver
        };
        match timeout(PATIENCE, waiter).await {
            Ok(Ok(stream)) => Ok(Some(stream)),
            _ => {
                self.table.lock().unwrap_or_else(PoisonError::into_inner).awaited.remove(&number);
                Err(StreamError::Missing(number))
            }
        }
    }
}

async fn read_header(stream: OwnedFd) -> io::Result<(Header, OwnedFd)> {
    let stream = crate::io::register(File::from(stream), Interest::READABLE)?;
    let mut bytes = [0; HEADER_LEN];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match stream.async_io(Interest::READABLE, |mut file| file.read(rest)).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => filled += read,
        }
    }
    let header = Header::decode(bytes).map_err(io::Error::other)?;
    Ok((header, stream.into_inner().into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[tokio::test]
    async fn a_stream_meets_its_request_in_either_order() {
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
    async fn bytes_that_are_no_header_are_refused() {
        let (mut dialled, accepted) = UnixStream::pair().unwrap();
        accepted.set_nonblocking(true).unwrap();
        dialled.write_all(&[0; HEADER_LEN]).unwrap();
        assert!(read_header(accepted.into()).await.is_err());
    }
}
