//! The little of rtnetlink(7) that a pod's network needs: requests, acknowledgements, dumps and notices of new links.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const HEADER: usize = size_of::<libc::nlmsghdr>();

/// A message under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Starts a message of `kind` with `flags` beside NLM_F_REQUEST, and its fixed part.
    pub fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    /// Adds an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
        self
    }

    /// Adds an attribute that is a number.
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute that is a null-terminated string.
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX).to_ne_bytes();
        for (to, from) in self.bytes.iter_mut().zip(length) {
            *to = from;
        }
        self.bytes
    }
}

/// An interface as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: i32,
    /// Its hardware address.
    pub mac: Vec<u8>,
}

/// A socket in the network namespace it was opened in.
pub struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    /// Opens one in the current namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: socket(0, 0)? })
    }

    /// Sends a request and waits for its acknowledgement. The kernel answers within the call that sends.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn change(&self, message: Message) -> io::Result<()> {
        self.send(&message.finish_with_ack())?;
        self.receive(|_, _| ())
    }

    /// All interfaces.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        self.send(&Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0)).finish())?;
        let mut links = Vec::new();
        self.receive(|kind, body| {
            if kind == libc::RTM_NEWLINK {
                links.extend(parse_link(body));
            }
        })?;
        Ok(links)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the bytes live through the call and the length is their own.
        match unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) } {
            sent if sent < 0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn receive(&self, mut visit: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0u8; 32 * 1024];
        loop {
            // SAFETY: the buffer lives through the call and the length is its own.
            let read = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let Ok(read) = usize::try_from(read) else { return Err(io::Error::last_os_error()) };
            let mut rest = buffer.get(..read).unwrap_or_default();
            while let Some((kind, body, next)) = split(rest) {
                rest = next;
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = body.first_chunk::<4>().map_or(libc::EPROTO, |b| -i32::from_ne_bytes(*b));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
                    }
                    _ => visit(kind, body),
                }
            }
        }
    }
}

impl Message {
    fn finish_with_ack(self) -> Vec<u8> {
        let mut bytes = self.finish();
        if let Some(flags) = bytes.get_mut(6) {
            *flags |= libc::NLM_F_ACK as u8;
        }
        bytes
    }
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

fn socket(groups: u32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers; a non-negative result is a descriptor nobody else owns.
    let socket = unsafe {
        match libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags, libc::NETLINK_ROUTE) {
            fd if fd < 0 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    // SAFETY: sockaddr_nl is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups;
    let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address lives through the call and the length is its own.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct ifinfomsg`.
pub fn link_header(index: i32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// The first message of a datagram: its kind, its body, and what follows.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let mut rest = body.get(16..)?;
    while let Some(head) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == libc::IFLA_ADDRESS {
            return Some(Link { index, mac: rest.get(4..length)?.to_vec() });
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_wants() {
        let bytes = Message::new(16, libc::NLM_F_ACK, &[1, 2, 3]).text(3, "eth0").finish();
        assert_eq!(bytes.len(), 16 + 4 + 12);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 32);
        assert_eq!(&bytes[20..24], &[9, 0, 3, 0]);
        assert_eq!(&bytes[24..29], b"eth0\0");
    }

    #[test]
    fn the_machine_has_a_loopback() {
        assert!(Netlink::open().unwrap().links().unwrap().iter().any(|link| link.index == 1));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes: Vec<u8>) {
            if let Some((_, body, _)) = split(&bytes) {
                parse_link(body);
            }
            parse_link(&bytes);
        }
    }
}
