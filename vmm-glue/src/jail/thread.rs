//! Drops the rights that a kind of thread does not need.

use std::io;

use nix::sched::{CloneFlags, unshare};

use super::kind::Kind;
use super::seccomp::{self, FilterError};
use super::{UNJAILED, capabilities};

/// Error from confining a thread.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The thread still has more rights than its kind needs.
    #[error("failed to {step} of a thread of kind {kind:?}")]
    Rights {
        /// The kind of the thread.
        kind: Kind,
        /// The step that failed.
        step: &'static str,
        /// The error of the step.
        source: io::Error,
    },
    /// The thread has no seccomp filter.
    #[error("failed to filter the system calls of a thread of kind {kind:?}")]
    Filter {
        /// The kind of the thread.
        kind: Kind,
        /// The error of the filter.
        source: FilterError,
    },
}

/// Confines this thread. The thread must not have served the guest before.
pub fn confine(kind: Kind) -> Result<(), ConfineError> {
    let error = |step| move |source| ConfineError::Rights { kind, step, source };
    if kind == Kind::FileServer {
        // For operations on extended attributes, virtiofsd changes the working directory. Therefore, this thread must
        // not share its working directory with other threads.
        unshare(CloneFlags::CLONE_FS).map_err(|errno| error("separate the working directory")(errno.into()))?;
    }
    if UNJAILED {
        return Ok(());
    }
    if matches!(kind, Kind::FileServer | Kind::FileSupervisor) {
        capabilities::keep_for_files().map_err(error("reduce the capabilities"))?;
    } else {
        capabilities::drop_all().map_err(error("drop the capabilities"))?;
    }
    seccomp::load(kind).map_err(|source| ConfineError::Filter { kind, source })
}
