//! Notifications of new and changed network interfaces.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_netlink::socket;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Notifications of new and changed interfaces in the network namespace in which the socket was opened.
pub struct LinkNotifications {
    socket: AsyncFd<OwnedFd>,
}

impl LinkNotifications {
    /// Subscribes to notifications of the current network namespace.
    pub fn subscribe() -> io::Result<Self> {
        let socket = socket(libc::RTMGRP_LINK as u32, libc::SOCK_NONBLOCK)?;
        Ok(Self { socket: husk_base::async_fd::register(socket, Interest::READABLE)? })
    }

    /// Waits for the next notification. A receive buffer overrun (ENOBUFS) counts as a notification.
    pub async fn next(&self) -> io::Result<()> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                let mut bytes = [0u8; 8192];
                match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                    Ok(_) | Err(nix::Error::ENOBUFS) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }
}
