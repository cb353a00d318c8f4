//! Errors of the shim's ttrpc services. Clients match on the error texts and codes of runc's shim. Therefore, if runc's
//! shim has a corresponding error, Husk uses the text and code of that error.

use ttrpc::Code;

/// Why a request to one of the shim's services failed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No container has this id.
    #[error("container not created: not found")]
    NoContainer,
    /// The container has no process with this id.
    #[error("process does not exist {0}: not found")]
    NoProcess(String),
    /// A container or exec with this id already exists.
    #[error("id {0}: already exists")]
    Exists(String),
    /// A request to delete the container arrived while the container was being created.
    #[error("the creation of the container was cancelled, because a request deletes the container")]
    Cancelled,
    /// The process to signal has exited.
    #[error("process already finished: not found")]
    Finished,
    /// The exec to signal has not been started.
    #[error("process not created: failed precondition")]
    NotStarted,
    /// A client has killed the exec while it was being started.
    #[error("the process was killed while it was being started: failed precondition")]
    KilledAtStart,
    /// The process to start is not in the state `created`. The field is the process's state.
    #[error("cannot start a {0} process: failed precondition")]
    Start(&'static str),
    /// The process to delete has not ended. The field is the process's state.
    #[error("cannot delete a {0} process: failed precondition")]
    Delete(&'static str),
    /// The exec's container is not running. The field is the container's state.
    #[error("cannot exec in a {0} state: failed precondition")]
    Exec(&'static str),
    /// The container to pause is not running. The field is the container's state.
    #[error("cannot pause a {0} container: failed precondition")]
    Pause(&'static str),
    /// The container to resume is not paused. The field is the container's state.
    #[error("cannot resume a {0} container: failed precondition")]
    Resume(&'static str),
    /// The container to update has exited.
    #[error("cannot update a stopped container: failed precondition")]
    Update,
    /// The process whose terminal is to be resized has exited.
    #[error("cannot resize a stopped container: failed precondition")]
    Resize,
    /// A value in the request is invalid.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// Husk does not support the request.
    #[error("{0}: not implemented")]
    Unsupported(&'static str),
    /// The request needs a running program, which the sandbox container does not have.
    #[error("the sandbox container does not run a program; use another container of the pod: failed precondition")]
    Sandbox,
    /// The request names a sandbox that this shim does not serve.
    #[error("sandbox {0}: not found")]
    NoSandbox(String),
    /// No CreateSandbox request has created the sandbox.
    #[error("the sandbox has not been created yet: failed precondition")]
    NotCreated,
    /// The sandbox has no cgroup on the host.
    #[error("the sandbox has no cgroup on the host: failed precondition")]
    NoMetrics,
    /// The VM has ended. The field says why.
    #[error("the sandbox's VM has ended: {0}: failed precondition")]
    Gone(std::sync::Arc<str>),
    /// The shim ends the pod, because the shim or the VMM has received a signal.
    #[error("the pod is ending, because the shim or the VMM received SIGTERM or SIGINT: failed precondition")]
    Ending,
    /// The VM has not ended, but its agent is not ready. For example, the guest is still booting.
    #[error("the agent in the sandbox's VM is not ready: failed precondition")]
    NotReady,
    /// The agent refused a request, or the call to the agent failed. The text comes from the agent, but is shortened
    /// and has no control characters.
    #[error("{text}")]
    Agent {
        /// The status code of the agent.
        code: Code,
        /// The error's text.
        text: String,
    },
    /// Any other failure.
    #[error(transparent)]
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl ServiceError {
    /// Returns the error for a failure that no other variant describes.
    pub fn failed(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Failed(cause.into())
    }

    /// Returns the ttrpc status code.
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer | Self::NoSandbox(_) | Self::NoProcess(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Cancelled => Code::CANCELLED,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Agent { code, .. } => *code,
            Self::Failed(_) => Code::UNKNOWN,
            _ => Code::FAILED_PRECONDITION,
        }
    }
}
