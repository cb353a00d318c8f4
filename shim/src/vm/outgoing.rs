//! The queue of requests that the shim has not sent to the agent yet.
//!
//! ttrpc closes the connection if the caller of a request goes away, or if the request's timeout expires, while the
//! request is partly written. The shim would then kill the VM. Therefore, this queue takes each request as a whole, and
//! a task of the connection sends the request, even if the caller goes away. The agent gets all requests in the order
//! in which they were made. For example, it gets the request to delete a container after the request to create it.
//!
//! A request whose timeout has expired before its first byte was sent is dropped, if its caller must be able to rely on
//! its failure ([`limit`]).

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protobuf::Message;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader};

use crate::lock;

/// Maximum size of the requests that wait, in bytes. A guest that hangs reads nothing. If more requests wait, the
/// connection ends, and the shim kills the VM.
pub const MAX_WAITING: usize = 32 << 20;

/// A queue of requests, and the task that sends them. The task ends when this value is dropped.
pub struct Outgoing {
    queue: Arc<Queue>,
    /// The beginning of a request whose other bytes ttrpc has not written yet.
    partial: Vec<u8>,
    task: AbortHandle,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    added: Notify,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<Waiter>,
    bytes: usize,
    /// Whether the connection can send nothing more.
    closed: bool,
}

/// A message that waits.
struct Waiter {
    bytes: Vec<u8>,
    /// When the message is dropped, if it still waits then.
    expiry: Option<Instant>,
}

impl Waiter {
    fn new(bytes: Vec<u8>) -> Self {
        let expiry = limit(&bytes).map(|limit| Instant::now() + limit);
        Self { bytes, expiry }
    }

    fn has_expired(&self) -> bool {
        self.expiry.is_some_and(|expiry| expiry <= Instant::now())
    }
}

/// Returns the timeout of a request that must not reach the agent after its timeout. Returns `None` for all other
/// messages.
///
/// The caller of a Create, Start, Exec, Pause, Resume or Update request has been told that the request has failed, and
/// may repeat it. Kill and Delete are still wanted: a client that has sent SIGTERM waits for its effect, and the agent
/// must not keep a container that the shim has deleted. The requests of Husk's own service, such as updates of volumes
/// and of the network, change a state that both sides follow.
fn limit(message: &[u8]) -> Option<Duration> {
    let (header, body) = message.split_first_chunk::<MESSAGE_HEADER_LENGTH>()?;
    if MessageHeader::from(*header).type_ != MESSAGE_TYPE_REQUEST {
        return None;
    }
    let request = ttrpc::Request::parse_from_bytes(body).ok()?;
    let is_still_wanted = !request.service.ends_with(".Task") || ["Kill", "Delete"].contains(&request.method.as_str());
    let nanos = u64::try_from(request.timeout_nano).ok().filter(|nanos| *nanos > 0 && !is_still_wanted);
    nanos.map(Duration::from_nanos)
}

impl Outgoing {
    /// Spawns the task that writes to `socket`.
    pub fn new(socket: OwnedWriteHalf) -> Self {
        let queue = Arc::<Queue>::default();
        let task = tokio::spawn(Arc::clone(&queue).send_all(socket)).abort_handle();
        Self { queue, partial: Vec::new(), task }
    }

    /// Takes all bytes, without waiting. When a message is complete, the task sends it.
    ///
    /// # Errors
    /// If the connection has ended, or if more than [`MAX_WAITING`] bytes wait.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let missing = self.missing().min(bytes.len());
            let (taken, rest) = bytes.split_at(missing);
            self.partial.extend_from_slice(taken);
            bytes = rest;
            if self.missing() == 0 {
                self.queue.push(std::mem::take(&mut self.partial))?;
            }
        }
        Ok(())
    }

    /// Returns how many bytes the current header lacks or, if the header is complete, the current message.
    fn missing(&self) -> usize {
        match self.partial.first_chunk::<MESSAGE_HEADER_LENGTH>() {
            Some(header) => {
                let body = usize::try_from(MessageHeader::from(*header).length).unwrap_or(usize::MAX);
                MESSAGE_HEADER_LENGTH.saturating_add(body).saturating_sub(self.partial.len())
            }
            None => MESSAGE_HEADER_LENGTH - self.partial.len(),
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // The write can wait for the agent.
        self.task.abort();
    }
}

impl Waiting {
    /// Drops the requests whose timeouts have expired.
    fn drop_expired(&mut self) {
        let bytes = &mut self.bytes;
        self.messages.retain(|message| {
            let expired = message.has_expired();
            if expired {
                *bytes = bytes.saturating_sub(message.bytes.len());
            }
            !expired
        });
    }

    /// Takes the next message that has not expired.
    fn pop(&mut self) -> Option<Waiter> {
        while let Some(message) = self.messages.pop_front() {
            if !message.has_expired() {
                return Some(message);
            }
            self.bytes = self.bytes.saturating_sub(message.bytes.len());
            tracing::debug!("dropped a request to the agent, because its timeout has expired before it was sent");
        }
        None
    }
}

impl Queue {
    fn push(&self, message: Vec<u8>) -> io::Result<()> {
        let message = Waiter::new(message);
        let mut waiting = lock(&self.waiting);
        if waiting.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if waiting.bytes.saturating_add(message.bytes.len()) > MAX_WAITING {
            waiting.drop_expired();
        }
        let bytes = waiting.bytes.saturating_add(message.bytes.len());
        if bytes > MAX_WAITING {
            waiting.closed = true;
            let text = format!("the agent does not read its requests: more than {} MiB wait", MAX_WAITING >> 20);
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        waiting.bytes = bytes;
        waiting.messages.push_back(message);
        drop(waiting);
        self.added.notify_one();
        Ok(())
    }

    async fn send_all(self: Arc<Self>, mut socket: OwnedWriteHalf) {
        loop {
            let message = lock(&self.waiting).pop();
            let Some(Waiter { bytes: message, .. }) = message else {
                self.added.notified().await;
                continue;
            };
            let sent = socket.write_all(&message).await;
            let mut waiting = lock(&self.waiting);
            waiting.bytes = waiting.bytes.saturating_sub(message.len());
            if let Err(error) = sent {
                // The shim reads the end of the connection, too.
                tracing::debug!(%error, "the connection to the agent takes no more requests");
                *waiting = Waiting { closed: true, ..Waiting::default() };
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let header = MessageHeader { length: u32::try_from(length).unwrap(), stream_id: 1, type_: 1, flags: 0 };
        let mut bytes = Vec::from(header);
        bytes.resize(MESSAGE_HEADER_LENGTH + length, 7);
        bytes
    }

    #[tokio::test]
    async fn messages_arrive_whole_and_in_order_however_they_are_written() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::new(ours.into_split().1);
        let all = [message(0), message(1), message(100_000), message(5)].concat();
        for part in all.chunks(7) {
            outgoing.write(part).unwrap();
        }
        let mut read = vec![0; all.len()];
        theirs.read_exact(&mut read).await.unwrap();
        assert_eq!(read, all);
        // An incomplete message is not sent.
        outgoing.write(&message(9)[..12]).unwrap();
        let more = tokio::time::timeout(Duration::from_millis(20), theirs.read(&mut [0])).await;
        assert!(more.is_err());
        drop(outgoing);
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn messages_that_wait_are_limited() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::new(ours.into_split().1);
        let large = message(4 << 20);
        let taken = (0..20).take_while(|_| outgoing.write(&large).is_ok()).count();
        assert_eq!(taken, MAX_WAITING / large.len());
        assert!(outgoing.write(&message(0)).is_err());
        drop(theirs);
    }

    #[tokio::test(start_paused = true)]
    async fn request_that_expires_before_it_is_sent_is_dropped_unless_it_ends_something() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::new(ours.into_split().1);
        // The agent does not read, and this message fills the socket.
        let large = message(4 << 20);
        outgoing.write(&large).unwrap();
        tokio::task::yield_now().await;
        let request = |service: &str, method: &str| {
            let (service, method) = (service.to_owned(), method.to_owned());
            let request = ttrpc::Request { service, method, timeout_nano: 1_000_000_000, ..Default::default() };
            let body = request.write_to_bytes().unwrap();
            let header = MessageHeader { length: body.len().try_into().unwrap(), stream_id: 1, type_: 1, flags: 0 };
            [Vec::from(header), body].concat()
        };
        let task = "containerd.task.v2.Task";
        for method in ["Create", "Start", "Exec", "Pause", "Resume", "Update", "Pids", "Stats"] {
            outgoing.write(&request(task, method)).unwrap();
        }
        let kept = [request(task, "Kill"), request(task, "Delete"), request("husk.Sandbox", "UpdateMirror")];
        kept.iter().for_each(|message| outgoing.write(message).unwrap());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let expected = [large, kept.concat()].concat();
        let mut read = vec![0; expected.len()];
        theirs.read_exact(&mut read).await.unwrap();
        assert!(read == expected, "the agent gets a request that has expired");
        // A message that is sent in time arrives.
        outgoing.write(&request(task, "Start")).unwrap();
        let mut read = vec![0; request(task, "Start").len()];
        theirs.read_exact(&mut read).await.unwrap();
        assert_eq!(lock(&outgoing.queue.waiting).bytes, 0);
    }

    #[tokio::test]
    async fn write_fails_after_the_connection_has_ended() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::new(ours.into_split().1);
        drop(theirs);
        outgoing.write(&message(1)).unwrap();
        while outgoing.write(&message(0)).is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
