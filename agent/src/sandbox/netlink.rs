//! Links as the guest needs them: the list by hardware address, and notices of new ones.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

pub use husk_netlink::{Message, Netlink, link_header};
use husk_netlink::{attributes, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An interface as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: i32,
    /// Its hardware address.
    pub mac: Vec<u8>,
}

/// All interfaces of the socket's namespace.
///
/// # Errors
/// What the kernel says.
pub fn links(netlink: &Netlink) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    let request = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0));
    netlink.dump(request, |kind, body| {
        if kind == libc::RTM_NEWLINK {
            links.extend(parse_link(body));
        }
    })?;
    Ok(links)
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let (_, mac) = attributes(body.get(16..)?).find(|(kind, _)| *kind == libc::IFLA_ADDRESS)?;
    Some(Link { index, mac: mac.to_vec() })
}

/// Notices of links that appear or change in the namespace it was opened in.
pub struct LinkNotices {
    socket: AsyncFd<OwnedFd>,
}

impl LinkNotices {
    /// Subscribes in the current namespace.
    ///
    /// # Errors
    /// What the kernel says.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_machine_has_a_loopback() {
        assert!(links(&Netlink::open().unwrap()).unwrap().iter().any(|link| link.index == 1));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes: Vec<u8>) {
            parse_link(&bytes);
        }
    }
}
