//! Registers fds with the async runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an fd with the current async runtime.
///
/// # Errors
/// If the runtime's epoll instance does not take the fd, such as that of a regular file.
pub fn register<T: AsRawFd + Into<OwnedFd>>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: a type that converts into `OwnedFd` owns its fd, so the fd stays open and unchanged while `fd` lives, and
    // the `AsyncFd` deregisters it before it drops it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
