//! Errors of the agent's ttrpc services. Each variant maps to a gRPC status code that containerd knows.

use ttrpc::{Code, get_status};

/// Error of a request.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The container or process does not exist, or the process has already exited.
    #[error("{0}: not found")]
    NotFound(String),
    /// The container or exec already exists.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The state of the container or process does not allow the request.
    #[error("{0}: failed precondition")]
    FailedPrecondition(String),
    /// The request is invalid.
    #[error("{0}: invalid argument")]
    InvalidArgument(String),
    /// This runtime does not support the request.
    #[error("{0}: not implemented")]
    Unimplemented(String),
    /// Any other error; the text is complete.
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

/// Returns a function that converts an unexpected error of `action` (verb and object) to a [`Fault`].
pub fn internal<E: std::error::Error>(action: &'static str) -> impl Fn(E) -> Fault {
    move |error| Fault::Unknown(format!("failed to {action}: {}", husk_base::error::chain(&error)))
}
