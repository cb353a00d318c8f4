//! Registers fds with the async runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an fd with the current async runtime.
///
/// # Errors
/// The error of epoll if it does not support the fd, for example the fd of a regular file.
pub fn register<T: AsRawFd + Into<OwnedFd>>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: a type that converts into `OwnedFd` owns its fd. Therefore, the fd stays open and unchanged while `fd`
    // lives. The `AsyncFd` deregisters the fd before it drops `fd`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
