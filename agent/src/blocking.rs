//! Runs system calls that can block on threads of their own.
//!
//! The agent has one async thread, which also reaps all children. A container can make many system calls of the agent
//! slow. For example, a process of a container can hold a lock of the kernel while a CPU limit throttles the process.

use crate::error::{Cause, ServiceError, failed};

/// Runs `work` on a thread of the blocking pool. `action` (verb and object) says what failed. `work` runs to completion
/// even if the returned future is dropped.
pub async fn run<T: Send + 'static, E: Into<Cause> + Send + 'static>(
    action: &str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ServiceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(failed(action)),
        Err(error) => Err(failed(action)(error)),
    }
}
