//! Standard streams: the table of vsock streams, the pipes or terminal of a process, and the relays between them.

pub mod console;
pub mod relay;
pub mod stdio;
pub mod streams;

use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the executor.
///
/// # Errors
/// When it cannot be polled.
pub fn register<T: AsRawFd + Into<std::os::fd::OwnedFd>>(fd: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: a type that turns into an `OwnedFd` owns its descriptor, which stays open and the same while it lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
