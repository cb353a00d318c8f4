//! Why a request is refused, in the words and with the codes of containerd's own runc shim: clients match on them.

use ttrpc::{Code, Error};

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such container here.
    #[error("container not created: not found")]
    NoContainer,
    /// No such process in the container.
    #[error("process does not exist {0}: not found")]
    NoProcess(String),
    /// The id is taken.
    #[error("id {0}: already exists")]
    Exists(String),
    /// A signal for a process that has ended.
    #[error("process already finished: not found")]
    Finished,
    /// A signal for an exec that was not started.
    #[error("process not created: failed precondition")]
    NotStarted,
    /// Starting what is not freshly created.
    #[error("cannot start a {0} process: failed precondition")]
    Start(&'static str),
    /// Deleting what still runs.
    #[error("cannot delete a {0} process: failed precondition")]
    Delete(&'static str),
    /// Executing in what does not run.
    #[error("cannot exec in a {0} state: failed precondition")]
    Exec(&'static str),
    /// Pausing what does not run.
    #[error("cannot pause a {0} container: failed precondition")]
    Pause(&'static str),
    /// Resuming what is not paused.
    #[error("cannot resume a {0} container: failed precondition")]
    Resume(&'static str),
    /// Changing what has ended.
    #[error("cannot update a stopped container: failed precondition")]
    Update,
    /// Resizing the terminal of what has ended.
    #[error("cannot resize a stopped container: failed precondition")]
    Resize,
    /// Something the request says cannot be.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// A thing this runtime does not do.
    #[error("{0}: not implemented")]
    Unsupported(&'static str),
    /// A request for the container that stands for its pod, which only a program that runs could answer.
    #[error("the sandbox container runs nothing: ask a container of the pod: failed precondition")]
    Sandbox,
    /// Another sandbox than this shim's.
    #[error("sandbox {0}: not found")]
    NoSandbox(String),
    /// Starting a sandbox, or a container in one, that no request has created.
    #[error("the sandbox was not created: failed precondition")]
    NotCreated,
    /// The sandbox has no cgroup on the host.
    #[error("the sandbox has no cgroup of its own: failed precondition")]
    NoMetrics,
    /// The virtual machine is gone.
    #[error("the sandbox is gone: failed precondition")]
    Gone,
    /// Whatever else went wrong: the chain of causes.
    #[error("{0}")]
    Failed(String),
}

impl Refusal {
    /// Its ttrpc code.
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer | Self::NoSandbox(_) | Self::NoProcess(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Failed(_) => Code::UNKNOWN,
            _ => Code::FAILED_PRECONDITION,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        ttrpc::error::get_rpc_status(refusal.code(), refusal)
    }
}
