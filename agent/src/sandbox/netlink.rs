//! Links as the guest needs them: the list by hardware address, and notices of new ones.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_netlink::socket;
pub use husk_netlink::{Link, Message, Netlink, link_header, links};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Notices of links that appear or change in the namespace it was opened in.
pub struct LinkNotices {
    socket: AsyncFd<OwnedFd>,
}

impl LinkNotices {
    /// Subscribes in the current namespace.
    pub fn subscribe() -> io::Result<Self> {
        let socket = socket(libc::RTMGRP_LINK as u32, libc::SOCK_NONBLOCK)?;
        Ok(Self { socket: crate::io::register(socket, Interest::READABLE)? })
    }

    /// Waits until something happened to some link.
    ///
    /// # Errors
    /// What the kernel says; an overrun counts as a notice.
    pub async fn next(&self) -> io::Result<()> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                let mut bytes = [0u8; 8192];
                // SAFETY: the buffer lives through the call and the length is its own.
                match unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) } {
                    read if read < 0 => match io::Error::last_os_error() {
                        error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
                        error => Err(error),
                    },
                    _ => Ok(()),
                }
            })
            .await
    }
}
