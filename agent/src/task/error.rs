//! Errors of the Task API: each kind is a status code that containerd knows.

use ttrpc::{Code, get_status};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No such container, process or ended process.
    #[error("{0}: not found")]
    NotFound(String),
    /// It is there already.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The state does not allow it.
    #[error("{0}: failed precondition")]
    FailedPrecondition(String),
    /// The request makes no sense.
    #[error("{0}: invalid argument")]
    InvalidArgument(String),
    /// This runtime does not do that.
    #[error("{0}: not implemented")]
    Unimplemented(String),
    /// Anything else; the text is complete.
    #[error("{0}")]
    Unknown(String),
}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> Self {
        let (code, message) = match fault {
            Fault::NotFound(text) => (Code::NOT_FOUND, text),
            Fault::AlreadyExists(text) => (Code::ALREADY_EXISTS, text),
            Fault::FailedPrecondition(text) => (Code::FAILED_PRECONDITION, text),
            Fault::InvalidArgument(text) => (Code::INVALID_ARGUMENT, text),
            Fault::Unimplemented(text) => (Code::UNIMPLEMENTED, text),
            Fault::Unknown(text) => (Code::UNKNOWN, text),
        };
        Self::RpcStatus(get_status(code, message))
    }
}

/// An unexpected failure of `what`.
pub fn unknown<E: std::error::Error>(what: &'static str) -> impl Fn(E) -> Fault {
    move |error| Fault::Unknown(format!("{what}: {}", crate::log::chain(&error)))
}
