//! Fuzzes the kernel's answers to rtnetlink requests, from which the shim makes the guest's network.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_netlink::{Message, Netlink, nest};
use husk_shim::network::testing::{links, network};

use crate::input::input;

/// The requests of [`links`] and [`network`]. Each one has the next sequence number.
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
    /// A kind that is not in `KINDS`.
    other: Option<u16>,
    flags: u8,
    /// Ethernet interface that is up, or the header of another message.
    header: Vec<u8>,
    is_link: bool,
    attributes: Vec<(u8, Value)>,
    /// Number that is added to the correct length.
    len: i8,
}

impl Answer {
    fn encode(&self, sequence: u32) -> Vec<u8> {
        let kind = self.other.unwrap_or(KINDS[usize::from(self.kind) % KINDS.len()]);
        let link = husk_netlink::link_header(2, libc::IFF_UP as u32, 0);
        let mut header = if self.is_link { link.to_vec() } else { self.header.clone() };
        if self.is_link {
            // ARPHRD_ETHER
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
    /// The datagrams that answer each request.
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
        // A full socket drops the end of the dump. The request then fails with EAGAIN.
        let _ = theirs.send(&done);
    }
    let netlink = Netlink::over(OwnedFd::from(ours));
    let Ok(links) = links(&netlink) else { return };
    let Ok((request, unsupported)) = network(&netlink, &links) else { return };
    assert_eq!(request.interfaces.len(), links.len());
    drop(unsupported);
}
