//! A minimal rtnetlink(7) client for shim and agent: requests, acknowledgements, dumps and attributes.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

pub mod fib;
mod link;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send};

pub use link::{Link, link_header, links};

/// Address family IPv4 in the type that netlink messages use.
pub const IPV4: u8 = (libc::AF_INET & 0xff) as u8;
/// Address family IPv6 in the type that netlink messages use.
pub const IPV6: u8 = (libc::AF_INET6 & 0xff) as u8;
const HEADER_LEN: usize = size_of::<libc::nlmsghdr>();
const SEQUENCE_OFFSET: usize = 8;
/// Maximum length of an attribute's value. The 16-bit length of an attribute also counts its header of 4 bytes.
pub const MAX_VALUE: usize = u16::MAX as usize - 4;
/// Maximum size of a datagram that the kernel sends in a dump (`netlink_dump` in net/netlink/af_netlink.c).
const MAX_DATAGRAM: usize = 32 * 1024;
/// Maximum number of attempts to dump a list that changes during each dump.
const MAX_DUMPS: usize = 16;

/// A message under construction.
pub struct Message {
    bytes: Vec<u8>,
    /// Type of the first attribute whose value is longer than [`MAX_VALUE`], and the length of that value in bytes.
    oversized: Option<(u16, usize)>,
}

impl Message {
    /// Starts a message of type `kind`. `flags` are added to NLM_F_REQUEST. `header` is the family's fixed header, such
    /// as `struct ifinfomsg`.
    pub fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        let flags = ((flags | libc::NLM_F_REQUEST).cast_unsigned() & 0xffff) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(header);
        let mut message = Self { bytes, oversized: None };
        message.pad();
        message
    }

    /// Appends an attribute. If `value` is longer than [`MAX_VALUE`], [`Message::finish`] fails.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        if value.len() > MAX_VALUE {
            self.oversized.get_or_insert((kind, value.len()));
            return self;
        }
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
    ///
    /// # Errors
    /// Fails if the value of an attribute is longer than [`MAX_VALUE`], or if the message is too long for its 32-bit
    /// length field.
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        if let Some((kind, length)) = self.oversized {
            let text =
                format!("failed to encode netlink attribute {kind}: {length} bytes exceed the maximum, {MAX_VALUE}");
            return Err(invalid(text));
        }
        let length = self.bytes.len();
        let Ok(length) = u32::try_from(length) else {
            return Err(invalid(format!(
                "failed to encode a netlink message: {length} bytes exceed the maximum, {}",
                u32::MAX
            )));
        };
        overwrite(&mut self.bytes, 0, &length.to_ne_bytes());
        Ok(self.bytes)
    }
}

/// Overwrites a field of the header.
fn overwrite(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes.iter_mut().skip(offset).zip(field).for_each(|(to, from)| *to = *from);
}

/// Encodes `attributes` as the value of a nested attribute. If one of the encoded values is longer than [`MAX_VALUE`],
/// the result is also longer. Therefore, [`Message::finish`] fails for a message with this result as an attribute.
pub fn nest(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        push_attribute(&mut bytes, *kind, value);
    }
    bytes
}

fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Only `nest` passes a value that is longer than MAX_VALUE. The result of `nest` is then also too long, and
    // `Message::finish` fails. Therefore, the length `u16::MAX`, which is wrong for this value, is never sent.
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

/// An rtnetlink socket. Two threads must not send requests at the same time, because they would receive each other's
/// replies. The socket stays in the network namespace in which it was opened.
pub struct Netlink {
    socket: OwnedFd,
    /// Sequence number of the next request. Starts at 1, because the kernel's notifications have sequence number 0.
    sequence: AtomicU32,
}

impl Netlink {
    /// Opens a socket in the current network namespace.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: socket(0, 0)?, sequence: AtomicU32::new(1) })
    }

    /// Returns a client on a socket whose other end answers in the kernel's place.
    #[cfg(feature = "testing")]
    pub fn over(socket: OwnedFd) -> Self {
        Self { socket, sequence: AtomicU32::new(1) }
    }

    /// Sends a request and waits for its acknowledgement. The wait is short, because the kernel queues the reply before
    /// send(2) returns.
    ///
    /// # Errors
    /// The errno of the kernel's NLMSG_ERROR reply or of the socket call that failed, or the error of
    /// [`Message::finish`].
    pub fn change(&self, message: Message) -> io::Result<()> {
        let mut request = message.finish()?;
        if let Some(flags) = request.get_mut(6) {
            *flags |= (libc::NLM_F_ACK & 0xff) as u8;
        }
        self.call(&mut request, |_, _| ()).map(drop)
    }

    /// Sends a dump request, and returns what `parse` makes of the type and body of each entry. Returns `None` if these
    /// are more than `max` values. The flags of the request must include NLM_F_DUMP.
    ///
    /// Repeats the dump if the list changed while the kernel sent it (NLM_F_DUMP_INTR).
    ///
    /// After [`MAX_DUMPS`] attempts, uses the last dump, which may be inconsistent. A caller that dumps a frequently
    /// changing list must also subscribe to the changes and dump the list again after each change.
    ///
    /// # Errors
    /// The errors of [`Netlink::change`].
    pub fn dump<T>(
        &self,
        message: Message,
        max: usize,
        mut parse: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Option<Vec<T>>> {
        let mut request = message.finish()?;
        let (mut values, mut fits) = (Vec::new(), true);
        for _ in 0..MAX_DUMPS {
            values.clear();
            // Receive the rest of a list that is too long, too. The socket refuses the next dump until then.
            let is_consistent = self.call(&mut request, |kind, body| {
                let value = if fits { parse(kind, body) } else { None };
                fits &= value.is_none() || values.len() < max;
                values.extend(value.filter(|_| fits));
            })?;
            if is_consistent || !fits {
                break;
            }
        }
        Ok(fits.then_some(values))
    }

    /// Sends a request and receives its reply. Returns false if the reply is an interrupted dump, and therefore may be
    /// inconsistent.
    fn call(&self, request: &mut [u8], mut visit: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        overwrite(request, SEQUENCE_OFFSET, &sequence.to_ne_bytes());
        send(self.socket.as_raw_fd(), request, MsgFlags::empty())?;
        // The buffer has to hold an NLMSG_ERROR reply, which repeats the request.
        let mut buffer = vec![0u8; MAX_DATAGRAM + request.len()];
        let mut consistent = true;
        loop {
            let datagram = receive_datagram(self.socket.as_fd(), &mut buffer)?;
            if read_datagram(datagram, sequence, &mut consistent, &mut visit)? {
                return Ok(consistent);
            }
        }
    }
}

/// Receives a datagram.
///
/// # Errors
/// Fails if the datagram is larger than `buffer`, because the kernel drops the bytes that do not fit into `buffer`.
fn receive_datagram<'a>(socket: BorrowedFd<'_>, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    // With MSG_TRUNC as an argument, recv(2) returns the datagram's real length.
    let length = recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC)?;
    let size = buffer.len();
    buffer.get(..length).ok_or_else(|| {
        let text = format!("failed to receive a netlink datagram: {length} bytes exceed the buffer of {size}");
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

/// Reads the messages of a datagram that answer the request with this sequence number. Returns whether the reply is
/// complete. Clears `consistent` if the reply is an interrupted dump.
///
/// Skips messages that answer other requests. If an error interrupted the reading of an earlier reply, the rest of that
/// reply may still be in the socket.
fn read_datagram(
    bytes: &[u8],
    sequence: u32,
    consistent: &mut bool,
    visit: &mut impl FnMut(u16, &[u8]),
) -> io::Result<bool> {
    let mut rest = bytes;
    while let Some((Header { kind, flags, sequence: answered }, body, next)) = split(rest) {
        rest = next;
        if answered != sequence {
            continue;
        }
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

/// The fields of `struct nlmsghdr` that are needed to read a reply.
struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

/// Splits off the first message of a datagram. Returns its header and body, and the rest of the datagram.
fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk::<4>()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(SEQUENCE_OFFSET..SEQUENCE_OFFSET + 4)?.try_into().ok()?);
    let body = bytes.get(HEADER_LEN..length)?;
    Some((Header { kind, flags, sequence }, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn message_layout_matches_the_kernel_format() {
        let bytes = Message::new(16, libc::NLM_F_ACK, &[1, 2, 3]).text(3, "eth0").finish().unwrap();
        assert_eq!(bytes.len(), 16 + 4 + 12);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 32);
        assert_eq!(&bytes[20..24], &[9, 0, 3, 0]);
        assert_eq!(&bytes[24..29], b"eth0\0");
        assert_eq!(attributes(&bytes[20..]).collect::<Vec<_>>(), [(3, &b"eth0\0"[..])]);
        assert_eq!(nest(&[(1, b"a"), (2, b"")]), [5, 0, 1, 0, b'a', 0, 0, 0, 4, 0, 2, 0]);
    }

    /// Encodes a message as the kernel would send it.
    fn reply(kind: i32, flags: i32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Message::new(kind as u16, 0, body).finish().unwrap();
        overwrite(&mut bytes, SEQUENCE_OFFSET, &7u32.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        bytes
    }

    #[test]
    fn interrupted_dump_is_inconsistent() {
        for (flags, expected) in [(libc::NLM_F_MULTI, true), (libc::NLM_F_MULTI | libc::NLM_F_DUMP_INTR, false)] {
            let mut consistent = true;
            let mut entries = 0;
            let entry = reply(libc::RTM_NEWLINK.into(), flags, &[0; 16]);
            assert!(!read_datagram(&entry, 7, &mut consistent, &mut |_, _| entries += 1).unwrap());
            let done = reply(libc::NLMSG_DONE, libc::NLM_F_MULTI, &[0; 4]);
            assert!(read_datagram(&done, 7, &mut consistent, &mut |_, _| entries += 1).unwrap());
            assert_eq!((entries, consistent), (1, expected));
        }
    }

    #[test]
    fn errno_of_nlmsg_done_and_nlmsg_error_is_returned() {
        let errno = |kind, body: &[u8]| {
            read_datagram(&reply(kind, 0, body), 7, &mut true, &mut |_, _| ()).map_err(|error| error.raw_os_error())
        };
        let no_memory = (-libc::ENOMEM).to_ne_bytes();
        assert_eq!(errno(libc::NLMSG_DONE, &no_memory), Err(Some(libc::ENOMEM)));
        assert_eq!(errno(libc::NLMSG_ERROR, &no_memory), Err(Some(libc::ENOMEM)));
        assert_eq!(errno(libc::NLMSG_DONE, &[0; 4]), Ok(true));
        assert_eq!(errno(libc::NLMSG_DONE, &[]), Ok(true));
        assert_eq!(errno(libc::NLMSG_ERROR, &[]), Err(Some(libc::EPROTO)));
    }

    #[test]
    fn finish_rejects_an_attribute_that_is_too_long() {
        let message = |length| Message::new(16, 0, &[]).attribute(9, &vec![0; length]).number(1, 2).finish();
        assert_eq!(attributes(&message(MAX_VALUE).unwrap()[16..]).count(), 2);
        let error = message(MAX_VALUE + 1).unwrap_err().to_string();
        assert_eq!(error, "failed to encode netlink attribute 9: 65532 bytes exceed the maximum, 65531");
        let nested = nest(&[(1, &vec![0; MAX_VALUE + 1])]);
        assert!(Message::new(16, 0, &[]).attribute(9, &nested).finish().is_err());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socket(AF_NETLINK)")]
    fn replies_to_other_requests_are_skipped() {
        let mut datagram = reply(libc::NLMSG_ERROR, 0, &(-libc::ENOMEM).to_ne_bytes());
        datagram.extend(reply(libc::RTM_NEWLINK.into(), 0, &[0; 16]));
        let mut visited = 0;
        assert!(!read_datagram(&datagram, 8, &mut true, &mut |_, _| visited += 1).unwrap());
        assert_eq!(visited, 0);
        // The reply to this request stays in the socket, because nothing receives it. `links` has to skip that reply.
        let netlink = Netlink::open().unwrap();
        let request = Message::new(libc::RTM_NEWLINK, libc::NLM_F_ACK, &link_header(i32::MAX, 0, 0)).finish().unwrap();
        send(netlink.socket.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
        assert!(!links(&netlink).unwrap().is_empty());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_DGRAM)")]
    fn dump_keeps_no_more_than_the_maximum() {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let netlink = Netlink { socket: ours.into(), sequence: AtomicU32::new(7) };
        let mut parsed = 0;
        let mut dump = |max| {
            for kind in [libc::RTM_NEWLINK.into(), 99, libc::RTM_NEWLINK.into(), 99, libc::RTM_NEWLINK.into()] {
                theirs.send(&reply(kind, libc::NLM_F_MULTI, &[0; 16])).unwrap();
            }
            theirs.send(&reply(libc::NLMSG_DONE, libc::NLM_F_MULTI, &[0; 4])).unwrap();
            netlink.sequence.store(7, Ordering::Relaxed);
            let request = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0));
            let found = netlink.dump(request, max, |kind, _| {
                parsed += usize::from(kind == libc::RTM_NEWLINK);
                (kind == libc::RTM_NEWLINK).then_some(())
            });
            found.unwrap().map(|found| found.len())
        };
        assert_eq!([dump(3), dump(2), dump(0), dump(4)], [Some(3), None, None, Some(3)]);
        assert_eq!(parsed, 3 + 3 + 1 + 3);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_DGRAM)")]
    fn truncated_datagram_is_an_error() {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut buffer = [0; 8];
        for (length, fits) in [(8, true), (9, false)] {
            theirs.send(&vec![1; length]).unwrap();
            assert_eq!(receive_datagram(ours.as_fd(), &mut buffer).is_ok(), fits);
        }
        // The kernel's error reply repeats the request, here 64 KiB. Therefore, this reply is larger than any datagram
        // of a dump (32 KiB).
        let request = Message::new(libc::RTM_NEWLINK, 0, &link_header(i32::MAX, 0, 0));
        let error = Netlink::open().unwrap().change(request.attribute(1, &[0; MAX_VALUE])).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }

    proptest! {
        #[test]
        fn reading_arbitrary_bytes_never_panics(bytes: Vec<u8>) {
            let _ = read_datagram(&bytes, 0, &mut true, &mut |_, _| ());
            if let Some((_, body, _)) = split(&bytes) {
                attributes(body).count();
            }
            attributes(&bytes).count();
        }
    }
}
