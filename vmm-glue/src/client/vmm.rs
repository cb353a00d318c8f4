//! A blocking client of the VMM. The client sends one request at a time and keeps notices in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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
    pub fn call(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), CallError> {
        self.seq += 1;
        wire::send(&self.control, &Request { seq: self.seq, call }, fds).map_err(CallError::Send)?;
        loop {
            match wire::recv::<Reply>(&self.control).map_err(CallError::Receive)? {
                (Reply::Answer { seq, result }, fds) if seq == self.seq => {
                    return result.map(|answer| (answer, fds)).map_err(CallError::Refused);
                }
                (Reply::Answer { .. }, _) => {}
                (Reply::Notice(notice), _) => self.notices.push_back(notice),
            }
        }
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
            if let (Reply::Notice(notice), _) = wire::recv::<Reply>(&self.control).map_err(CallError::Receive)? {
                self.notices.push_back(notice);
            }
        }
    }

    /// Opens a vsock connection to a port in the guest.
    pub fn connect(&mut self, port: u32) -> Result<std::os::unix::net::UnixStream, CallError> {
        match self.call(Call::Connect { port }, &[])? {
            (Answer::Connected, mut fds) => fds.pop().map(Into::into).ok_or_else(|| {
                CallError::Refused(format!("failed to connect to guest port {port}: the VMM's answer has no socket"))
            }),
            (other, _) => {
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
