//! Errors of the agent's ttrpc services. Each variant maps to a gRPC status code that containerd knows.

use ttrpc::{Code, Error};

/// Cause of an error.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Error of a request.
///
/// The shim passes the text on unchanged. containerd's client appends the status code in words, such as ": not found".
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The container or process does not exist, or the process has already exited.
    #[error("{0}")]
    NotFound(String),
    /// The container or exec already exists.
    #[error("{0}")]
    AlreadyExists(String),
    /// The state of the container or process does not allow the request.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request is invalid.
    #[error("{0}")]
    InvalidArgument(String),
    /// A part of the request is invalid. The cause says why.
    #[error("{0}")]
    Malformed(&'static str, #[source] Cause),
    /// The agent policy does not allow the request.
    #[error(transparent)]
    Refused(#[from] husk_policy::Refusal),
    /// This runtime does not support the request.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// An action (verb and object) failed.
    #[error("failed to {0}")]
    Failed(String, #[source] Cause),
    /// The guest was made from a template, and could not be made this pod's guest.
    #[error("failed to make the guest of a template this pod's guest")]
    Template(#[source] Cause),
    /// Any other error. The text is the complete message.
    #[error("{0}")]
    Unknown(String),
}

impl ServiceError {
    /// Returns the ttrpc status code.
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) | Self::Malformed(..) => Code::INVALID_ARGUMENT,
            Self::Refused(_) => Code::PERMISSION_DENIED,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            // The shim removes the template.
            Self::Template(_) => Code::DATA_LOSS,
            Self::Failed(..) | Self::Unknown(_) => Code::UNKNOWN,
        }
    }
}

/// Only this conversion joins the chain of causes into one text.
impl From<ServiceError> for Error {
    fn from(error: ServiceError) -> Self {
        ttrpc::error::get_rpc_status(error.code(), husk_base::error::chain(&error))
    }
}

/// Returns a function that wraps an unexpected error. `action` (verb and object) says what failed.
pub fn failed<E: Into<Cause>>(action: impl Into<String>) -> impl FnOnce(E) -> ServiceError {
    move |error| ServiceError::Failed(action.into(), error.into())
}

/// Returns a function that wraps an error in a part of the request. `text` says which part is invalid.
pub fn malformed<E: Into<Cause>>(text: &'static str) -> impl FnOnce(E) -> ServiceError {
    move |error| ServiceError::Malformed(text, error.into())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn rpc_status_has_the_code_and_all_causes() {
        let status = |error: ServiceError| match Error::from(error) {
            Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other}"),
        };
        let cause = io::Error::other(io::Error::from_raw_os_error(libc::EPERM));
        let text = "failed to open the cgroup: Operation not permitted (os error 1)";
        assert_eq!(status(failed("open the cgroup")(cause)), (Code::UNKNOWN, text.to_owned()));
        let error = malformed("invalid namespaces")("no path");
        assert_eq!(status(error), (Code::INVALID_ARGUMENT, "invalid namespaces: no path".to_owned()));
        assert_eq!(status(ServiceError::NotFound("task a".into())), (Code::NOT_FOUND, "task a".to_owned()));
    }
}
