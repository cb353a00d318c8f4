//! A blocking client of the VMM. The client sends one request at a time and keeps notices in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::control::{Answer, Call, Notice, Reply, Request, wire};

/// Error of a request.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The VMM refused the request or failed to serve it.
    #[error("{0}")]
    Refused(String),
    /// The request could not be sent.
    #[error("failed to send a request on the control socket")]
    Send(#[source] io::Error),
    /// The sockets of a connection could not be created.
    #[error("failed to create a socket pair for a connection to the guest")]
    Socket(#[source] io::Error),
    /// The control socket failed, or was closed because the VMM has ended.
    #[error("failed to receive from the control socket")]
    Receive(#[source] io::Error),
}

/// A client of one VMM process.
#[derive(Debug)]
pub struct Vmm {
    control: OwnedFd,
    seq: u64,
    notices: VecDeque<Notice>,
}

impl Vmm {
    /// Creates a client on a blocking control socket.
    pub fn new(control: OwnedFd) -> Self {
        Self { control, seq: 0, notices: VecDeque::new() }
    }

    /// Sends a request and waits for its answer.
    pub fn call(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Answer, CallError> {
        self.seq += 1;
        wire::send(&self.control, &Request { seq: self.seq, call }, fds).map_err(CallError::Send)?;
        loop {
            match self.receive()? {
                Reply::Answer { seq, result } if seq == self.seq => return result.map_err(CallError::Refused),
                Reply::Answer { .. } => {}
                Reply::Notice(notice) => self.notices.push_back(notice),
            }
        }
    }

    fn receive(&self) -> Result<Reply, CallError> {
        let received = wire::receive_bytes(&self.control).and_then(wire::Packet::decode::<Reply>);
        received.map(|(reply, _)| reply).map_err(CallError::Receive)
    }

    /// Removes and returns the notices that arrived while the client waited for answers.
    pub fn take_notices(&mut self) -> VecDeque<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Waits for the next notice.
    ///
    /// # Errors
    /// [`CallError::Receive`] if the control socket fails, or if the VMM has ended.
    pub fn notice(&mut self) -> Result<Notice, CallError> {
        loop {
            if let Some(notice) = self.notices.pop_front() {
                return Ok(notice);
            }
            if let Reply::Notice(notice) = self.receive()? {
                self.notices.push_back(notice);
            }
        }
    }

    /// Opens a vsock connection to a port in the guest.
    ///
    /// # Errors
    /// [`CallError`]. [`CallError::Socket`] if the sockets cannot be created.
    pub fn connect(&mut self, port: u32) -> Result<UnixStream, CallError> {
        let (ours, theirs) = UnixStream::pair().map_err(CallError::Socket)?;
        match self.call(Call::Connect { port }, &[theirs.as_fd()])? {
            Answer::Connected => Ok(ours),
            other => {
                Err(CallError::Refused(format!("failed to connect to guest port {port}: unexpected answer {other:?}")))
            }
        }
    }
}

impl AsFd for Vmm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}
