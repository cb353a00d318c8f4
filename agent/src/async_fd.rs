//! Registers fds with the async runtime.

use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an fd with the async runtime.
pub fn register<T: AsRawFd + Into<std::os::fd::OwnedFd>>(fd: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: a type that converts into `OwnedFd` owns its fd, so the fd stays open and unchanged while `fd` lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
