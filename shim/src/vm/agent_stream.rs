//! The shim's connection to the agent. The connection limits the number of events that the shim has received but not
//! handled.
//!
//! ttrpc puts the messages of a stream into a queue, and the length of the queue is not limited. An agent that sends
//! events faster than the shim handles them would fill the shim's memory. Therefore, this connection reads no further
//! message while `MAX_UNHANDLED` events are unhandled. The buffers of the vsock connection then fill up, and the agent
//! has to wait.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MessageHeader};

use crate::lock;
use crate::vm::outgoing::Outgoing;
use crate::vm::throttle::Throttled;

/// Maximum number of events that are received but not handled.
pub const MAX_UNHANDLED: usize = 64;
/// Maximum length of an event in bytes. An event contains two ids and a few numbers, or the path
/// of a socket and the ids of a process's groups.
pub const MAX_EVENT: u32 = 4096;

/// Counts the events that are received but not handled.
#[derive(Debug, Default)]
pub struct UnhandledEvents(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    events: usize,
    /// Whether the shim has closed the connection.
    closed: bool,
    /// Wakes the task that reads from the connection, if the task waits until the shim has handled an event.
    reader: Option<Waker>,
    /// Wakes the task that reads from the connection when the shim closes the connection.
    closer: Option<Waker>,
}

impl UnhandledEvents {
    /// Records that an event was handled.
    pub fn handled(&self) {
        let mut count = lock(&self.0);
        count.events = count.events.saturating_sub(1);
        if let Some(reader) = count.reader.take() {
            reader.wake();
        }
    }

    /// Closes the connection: its reader gets EOF. All calls that wait for an answer then fail.
    pub fn close(&self) {
        let mut count = lock(&self.0);
        count.closed = true;
        for waker in [count.reader.take(), count.closer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// Returns whether the shim has closed the connection. If not, `close` wakes the task of `context`.
    fn is_closed(&self, context: &Context<'_>) -> bool {
        let mut count = lock(&self.0);
        if !count.closed && !count.closer.as_ref().is_some_and(|closer| closer.will_wake(context.waker())) {
            count.closer = Some(context.waker().clone());
        }
        count.closed
    }

    fn received(&self) {
        lock(&self.0).events += 1;
    }

    /// Returns whether the next message may be read. If not, `handled` wakes the task of `context`.
    fn has_room(&self, context: &Context<'_>) -> bool {
        let mut count = lock(&self.0);
        let room = count.events < MAX_UNHANDLED;
        if !room {
            count.reader = Some(context.waker().clone());
        }
        room
    }
}

/// The shim's connection to the agent. The connection tracks where each received message begins and ends.
pub struct AgentStream {
    stream: Take<Throttled<OwnedReadHalf>>,
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// Number of bytes of the current header that were read.
    header_len: usize,
    /// Number of bytes of the current message's body that were not read yet.
    body: u32,
    unhandled: Arc<UnhandledEvents>,
    outgoing: Outgoing,
}

impl AgentStream {
    /// Wraps a connected socket. Spawns the task that sends the requests.
    pub fn new(stream: UnixStream, unhandled: Arc<UnhandledEvents>) -> Self {
        let (input, output) = stream.into_split();
        let (stream, outgoing) = (Throttled::new(input).take(0), Outgoing::new(output));
        Self { stream, header: [0; MESSAGE_HEADER_LENGTH], header_len: 0, body: 0, unhandled, outgoing }
    }

    /// Records bytes of a header. When the header is complete, checks the length of an event and counts the event.
    fn follow_header(&mut self, bytes: &[u8]) -> io::Result<()> {
        for (to, from) in self.header.iter_mut().skip(self.header_len).zip(bytes) {
            *to = *from;
        }
        self.header_len += bytes.len();
        if self.header_len < MESSAGE_HEADER_LENGTH {
            return Ok(());
        }
        self.header_len = 0;
        let header = MessageHeader::from(self.header);
        self.body = header.length;
        if header.type_ == MESSAGE_TYPE_DATA {
            if header.length > MAX_EVENT {
                let text = format!("the agent sent an event of {} bytes, more than {MAX_EVENT}", header.length);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.unhandled.received();
        }
        Ok(())
    }
}

impl AsyncRead for AgentStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unhandled.is_closed(context) {
            return Poll::Ready(Ok(()));
        }
        let in_header = self.body == 0;
        if in_header && self.header_len == 0 && !self.unhandled.has_room(context) {
            return Poll::Pending;
        }
        // Read no further than the end of the header or the body.
        let rest = if in_header { (MESSAGE_HEADER_LENGTH - self.header_len) as u64 } else { self.body.into() };
        self.stream.set_limit(rest);
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let new = buffer.filled().get(before..).unwrap_or_default();
        if in_header {
            self.follow_header(new)?;
        } else {
            self.body -= u32::try_from(new.len()).unwrap_or(self.body);
        }
        Poll::Ready(Ok(()))
    }
}

/// Writes and flushes never wait, see [`Outgoing`].
impl AsyncWrite for AgentStream {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.outgoing.write(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
