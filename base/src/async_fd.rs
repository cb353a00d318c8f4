//! Registers fds with the async runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an fd with the current async runtime.
///
/// # Errors
/// Returns the error from epoll. For example, epoll does not support regular files.
pub fn register<T: AsRawFd + Into<OwnedFd>>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: a type that converts into `OwnedFd` owns its fd. Therefore, the fd stays open, and its number does not
    // change, while `fd` lives. The `AsyncFd` deregisters the fd before it drops `fd`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
