//! Requests that a handler answers after it has returned.

use std::sync::Arc;

use super::session::Session;
use crate::guest_memory::GuestMemory;

/// The right to end a request after [`super::Handler::serve`] has returned.
pub struct Later<'a> {
    session: &'a Arc<Session>,
    head: u16,
    name: &'static str,
}

impl<'a> Later<'a> {
    /// Returns the right to end the request whose chain has this head. `name` is the handler's name, for log lines.
    pub fn new(session: &'a Arc<Session>, head: u16, name: &'static str) -> Self {
        Self { session, head, name }
    }

    /// Keeps the request.
    pub fn keep(self) -> KeptRequest {
        KeptRequest { session: Arc::clone(self.session), head: self.head, name: self.name }
    }
}

/// A request that has no answer yet. The request does not keep a pause or the end of the activation waiting.
pub struct KeptRequest {
    session: Arc<Session>,
    head: u16,
    name: &'static str,
}

impl KeptRequest {
    /// Ends the request. `write` writes the answer, and returns the number of bytes written to the chain. Waits for the
    /// end of a pause. Does nothing if the activation has ended.
    pub fn end(self, write: impl FnOnce(&GuestMemory) -> u32) {
        self.session.end_kept(self.name, self.head, write);
    }
}
