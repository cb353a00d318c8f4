//! Fuzzes the answers of the host's kernel to rtnetlink requests. The shim makes the guest's network configuration from
//! these answers.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_netlink::{Message, Netlink, nest};
use husk_shim::network::testing::{links, network};

use crate::input::input;

/// Number of requests that [`links`] and [`network`] send. The sequence numbers begin at 1.
const REQUESTS: u32 = 7;
const KINDS: [u16; 7] = [
    libc::RTM_NEWLINK,
    libc::RTM_NEWADDR,
    libc::RTM_NEWROUTE,
    libc::RTM_NEWNEIGH,
    libc::RTM_NEWRULE,
    libc::NLMSG_DONE as u16,
    libc::NLMSG_ERROR as u16,
];

#[derive(arbitrary::Arbitrary, Debug)]
enum Value {
    Bytes(Vec<u8>),
    Number(u32),
    Address([u8; 4]),
    LongAddress([u8; 16]),
    Nested(Vec<(u8, Vec<u8>)>),
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Answer {
    kind: u8,
    /// Any message type. If `None`, `kind` selects a message type of `KINDS`.
    other: Option<u16>,
    flags: u8,
    /// Header of the message, if `is_link` is false.
    header: Vec<u8>,
    /// Whether the header describes an Ethernet interface that is up.
    is_link: bool,
    attributes: Vec<(u8, Value)>,
    /// Difference between the encoded length and the correct length.
    len: i8,
}

impl Answer {
    fn encode(&self, sequence: u32) -> Vec<u8> {
        let kind = self.other.unwrap_or(KINDS[usize::from(self.kind) % KINDS.len()]);
        let link = husk_netlink::link_header(2, libc::IFF_UP as u32, 0);
        let mut header = if self.is_link { link.to_vec() } else { self.header.clone() };
        if self.is_link {
            // Set the interface's type to ARPHRD_ETHER.
            header[2] = 1;
        }
        let mut message = Message::new(kind, self.flags.into(), &header);
        for (kind, value) in self.attributes.iter().take(16) {
            let kind = u16::from(kind % 32);
            message = match value {
                Value::Bytes(bytes) => message.attribute(kind, bytes),
                Value::Number(number) => message.number(kind, *number),
                Value::Address(address) => message.attribute(kind, address),
                Value::LongAddress(address) => message.attribute(kind, address),
                Value::Nested(parts) => {
                    let parts: Vec<_> = parts.iter().map(|(kind, value)| (u16::from(*kind), &value[..])).collect();
                    message.attribute(kind, &nest(&parts))
                }
            };
        }
        let Ok(mut bytes) = message.finish() else { return Vec::new() };
        let len = (bytes.len() as u32).wrapping_add_signed(self.len.into());
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    /// For each request, the datagrams that answer the request.
    answers: [Vec<Vec<Answer>>; REQUESTS as usize],
    raw: Vec<u8>,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let (ours, theirs) = UnixDatagram::pair().expect("create a socket pair");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("set non-blocking mode");
    }
    let _ = theirs.send(&input.raw);
    for (sequence, datagrams) in (1..).zip(&input.answers) {
        for datagram in datagrams.iter().take(4) {
            let bytes: Vec<u8> = datagram.iter().flat_map(|answer| answer.encode(sequence)).collect();
            let _ = theirs.send(&bytes);
        }
        let mut done = Message::new(libc::NLMSG_DONE as u16, 0, &[0; 4]).finish().expect("encode the end of a dump");
        done[8..12].copy_from_slice(&sequence.to_ne_bytes());
        // If the socket buffer is full, this send fails, and the dump has no end. The request then fails with EAGAIN.
        let _ = theirs.send(&done);
    }
    let netlink = Netlink::over(OwnedFd::from(ours));
    let Ok(links) = links(&netlink) else { return };
    let Ok((request, unsupported)) = network(&netlink, &links) else { return };
    assert_eq!(request.interfaces.len(), links.len());
    drop(unsupported);
}
