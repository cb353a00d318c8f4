//! A minimal rtnetlink(7) client for shim and agent: requests, acknowledgements, dumps and attributes.

pub mod fib;
mod link;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use link::{Link, link_header, links};

const HEADER_LEN: usize = size_of::<libc::nlmsghdr>();

/// A message under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Starts a message of type `kind`. `flags` are added to NLM_F_REQUEST; `header` is the family's fixed header, such
    /// as `struct ifinfomsg`.
    pub fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(header);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    /// Appends an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        push_attribute(&mut self.bytes, kind, value);
        self
    }

    /// Appends a 32-bit attribute in host byte order.
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Appends a NUL-terminated string attribute.
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Fills in the length field and returns the encoded message.
    pub fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX).to_ne_bytes();
        for (to, from) in self.bytes.iter_mut().zip(length) {
            *to = from;
        }
        self.bytes
    }

    fn finish_with_ack(self) -> Vec<u8> {
        let mut bytes = self.finish();
        if let Some(flags) = bytes.get_mut(6) {
            *flags |= libc::NLM_F_ACK as u8;
        }
        bytes
    }
}

/// Encodes `attributes` as the value of a nested attribute.
pub fn nest(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        push_attribute(&mut bytes, *kind, value);
    }
    bytes
}

fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Iterates over the type and value of each attribute in `bytes`. Stops at the first malformed attribute.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [low, high, kind_low, kind_high] = *rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two upper bits are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        Some((u16::from_ne_bytes([kind_low, kind_high]) & 0x3fff, value))
    })
}

/// An rtnetlink socket. It stays in the network namespace in which it was opened.
pub struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    /// Opens a socket in the current network namespace.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: socket(0, 0)? })
    }

    /// Sends a request and waits for its acknowledgement. The kernel queues the answer within send(2), so the wait is
    /// short.
    ///
    /// # Errors
    /// The errno of the kernel's NLMSG_ERROR reply, or of the socket call that failed.
    pub fn change(&self, message: Message) -> io::Result<()> {
        self.send(&message.finish_with_ack())?;
        self.receive(|_, _| ())
    }

    /// Sends a dump request (NLM_F_DUMP in its flags) and passes the type and payload of each entry to `visit`.
    pub fn dump(&self, message: Message, visit: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.send(&message.finish())?;
        self.receive(visit)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: `bytes` outlives the call, and the length passed is the slice's length.
        match unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) } {
            sent if sent < 0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn receive(&self, mut visit: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0u8; 32 * 1024];
        loop {
            // SAFETY: `buffer` outlives the call, and the length passed is the buffer's length.
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

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Opens an rtnetlink socket that is subscribed to the multicast `groups` (RTMGRP_…). `flags` are type flags for
/// socket(2), such as SOCK_NONBLOCK.
pub fn socket(groups: u32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers. A non-negative result is a new fd that nothing else owns.
    let socket = unsafe {
        match libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags, libc::NETLINK_ROUTE) {
            fd if fd < 0 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    // SAFETY: all zeroes is a valid value of sockaddr_nl, which is plain data.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups;
    let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: `address` outlives the call, and the length passed is the size of its type.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Decodes a 32-bit attribute value; `None` if its length is not 4 bytes.
pub fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

/// Splits the first message off a datagram. Returns its type, its payload and the remaining bytes.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_LEN..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn message_layout_matches_the_kernel_format() {
        let bytes = Message::new(16, libc::NLM_F_ACK, &[1, 2, 3]).text(3, "eth0").finish();
        assert_eq!(bytes.len(), 16 + 4 + 12);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 32);
        assert_eq!(&bytes[20..24], &[9, 0, 3, 0]);
        assert_eq!(&bytes[24..29], b"eth0\0");
        assert_eq!(attributes(&bytes[20..]).collect::<Vec<_>>(), [(3, &b"eth0\0"[..])]);
        assert_eq!(nest(&[(1, b"a"), (2, b"")]), [5, 0, 1, 0, b'a', 0, 0, 0, 4, 0, 2, 0]);
    }

    proptest! {
        #[test]
        fn parsing_arbitrary_bytes_never_panics(bytes: Vec<u8>) {
            if let Some((_, body, _)) = split(&bytes) {
                attributes(body).count();
            }
            attributes(&bytes).count();
        }
    }
}
