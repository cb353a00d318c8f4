//! A minimal rtnetlink(7) client for shim and agent: requests, acknowledgements, dumps and attributes.

#![deny(clippy::indexing_slicing)]

pub mod fib;
mod link;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send};

pub use link::{Link, link_header, links};

const HEADER_LEN: usize = size_of::<libc::nlmsghdr>();
/// Maximum number of attempts to dump a list that changes during each dump.
const MAX_DUMPS: usize = 16;

/// A message under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Starts a message of type `kind`. `flags` are added to NLM_F_REQUEST. `header` is the family's fixed header, such
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

    /// Sends a request and waits for its acknowledgement. The wait is short, because the kernel queues the reply before
    /// send(2) returns.
    ///
    /// # Errors
    /// The errno of the kernel's NLMSG_ERROR reply, or of the socket call that failed.
    pub fn change(&self, message: Message) -> io::Result<()> {
        self.send(&message.finish_with_ack())?;
        self.receive(|_, _| ()).map(drop)
    }

    /// Sends a dump request and calls `visit` with the type and body of each entry. The flags of the request must
    /// include NLM_F_DUMP.
    ///
    /// Repeats the dump if the list changed while the kernel sent it (NLM_F_DUMP_INTR).
    ///
    /// After [`MAX_DUMPS`] attempts, uses the last dump, which may be inconsistent. A caller that dumps a frequently
    /// changing list also subscribes to the changes and dumps the list again after each change.
    pub fn dump(&self, message: Message, mut visit: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let request = message.finish();
        // The entries are collected first, because the entries of an interrupted dump must not be visited.
        let mut entries = Vec::new();
        for _ in 0..MAX_DUMPS {
            self.send(&request)?;
            entries.clear();
            if self.receive(|kind, body| entries.push((kind, body.to_vec())))? {
                break;
            }
        }
        entries.iter().for_each(|(kind, body)| visit(*kind, body));
        Ok(())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Receives the reply to a request. Returns whether the reply is consistent. An interrupted dump is inconsistent.
    fn receive(&self, mut visit: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        let mut buffer = vec![0u8; 32 * 1024];
        let mut consistent = true;
        loop {
            let read = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if read_datagram(buffer.get(..read).unwrap_or_default(), &mut consistent, &mut visit)? {
                return Ok(consistent);
            }
        }
    }
}

/// Reads the messages of a datagram. Returns whether the reply is complete. Sets `consistent` to false if the dump was
/// interrupted.
fn read_datagram(bytes: &[u8], consistent: &mut bool, visit: &mut impl FnMut(u16, &[u8])) -> io::Result<bool> {
    let mut rest = bytes;
    while let Some((kind, flags, body, next)) = split(rest) {
        rest = next;
        *consistent &= i32::from(flags) & libc::NLM_F_DUMP_INTR == 0;
        match i32::from(kind) {
            // The payload of both types is a negative errno. Old kernels send NLMSG_DONE without a payload.
            libc::NLMSG_DONE => return check_errno(body, 0),
            libc::NLMSG_ERROR => return check_errno(body, libc::EPROTO),
            _ => visit(kind, body),
        }
    }
    Ok(false)
}

/// Returns the error in the payload of NLMSG_DONE or NLMSG_ERROR, or `Ok(true)` for errno 0. `missing` is the errno
/// for a message without a payload.
fn check_errno(body: &[u8], missing: i32) -> io::Result<bool> {
    match body.first_chunk::<4>().map_or(missing, |bytes| i32::from_ne_bytes(*bytes).saturating_neg()) {
        0 => Ok(true),
        errno => Err(io::Error::from_raw_os_error(errno)),
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
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::from_bits_retain(flags);
    let socket = nix::sys::socket::socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// Decodes a 32-bit attribute value. Returns `None` if the length of `value` is not 4 bytes.
pub fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

/// Splits off the first message of a datagram. Returns the message's type, flags and body, and the rest of the
/// datagram.
fn split(bytes: &[u8]) -> Option<(u16, u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    let body = bytes.get(HEADER_LEN..length)?;
    Some((kind, flags, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    /// Encodes a message as the kernel would send it.
    fn reply(kind: i32, flags: i32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Message::new(kind as u16, 0, body).finish();
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        bytes
    }

    #[test]
    fn interrupted_dump_is_inconsistent() {
        for (flags, expected) in [(libc::NLM_F_MULTI, true), (libc::NLM_F_MULTI | libc::NLM_F_DUMP_INTR, false)] {
            let mut consistent = true;
            let mut entries = 0;
            let entry = reply(libc::RTM_NEWLINK.into(), flags, &[0; 16]);
            assert!(!read_datagram(&entry, &mut consistent, &mut |_, _| entries += 1).unwrap());
            let done = reply(libc::NLMSG_DONE, libc::NLM_F_MULTI, &[0; 4]);
            assert!(read_datagram(&done, &mut consistent, &mut |_, _| entries += 1).unwrap());
            assert_eq!((entries, consistent), (1, expected));
        }
    }

    #[test]
    fn errno_of_done_and_error_is_returned() {
        let errno = |kind, body: &[u8]| {
            read_datagram(&reply(kind, 0, body), &mut true, &mut |_, _| ()).map_err(|error| error.raw_os_error())
        };
        let no_memory = (-libc::ENOMEM).to_ne_bytes();
        assert_eq!(errno(libc::NLMSG_DONE, &no_memory), Err(Some(libc::ENOMEM)));
        assert_eq!(errno(libc::NLMSG_ERROR, &no_memory), Err(Some(libc::ENOMEM)));
        assert_eq!(errno(libc::NLMSG_DONE, &[0; 4]), Ok(true));
        assert_eq!(errno(libc::NLMSG_DONE, &[]), Ok(true));
        assert_eq!(errno(libc::NLMSG_ERROR, &[]), Err(Some(libc::EPROTO)));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = read_datagram(&bytes, &mut true, &mut |_, _| ());
            if let Some((_, _, body, _)) = split(&bytes) {
                attributes(body).count();
            }
            attributes(&bytes).count();
        }
    }
}
