//! Fuzzes the network configuration in requests to the agent. The agent parses the configuration and encodes netlink
//! messages. Each input is parsed as an `UpdateNetworkRequest`.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use husk_agent::testing::add_network;
use husk_netlink::{Message, Netlink, link_header};
use husk_proto::agent::UpdateNetworkRequest;
use protobuf::Message as _;

/// Maximum number of netlink requests that the agent sends for one input. The socket buffer has space for the answers
/// to this number of requests.
const MAX_REQUESTS: usize = 128;

/// Encodes the kernel's answer to a netlink request: an interface and an acknowledgement. The target sends the same
/// answer to each request.
fn answer(sequence: u32, mac: &[u8]) -> Vec<u8> {
    let link = Message::new(libc::RTM_NEWLINK, 0, &link_header(2, 0, 0)).attribute(libc::IFLA_ADDRESS, mac);
    let done = Message::new(libc::NLMSG_ERROR as u16, 0, &[0; 20]);
    let mut bytes = Vec::new();
    for message in [link, done] {
        let mut message = message.finish().expect("encode an answer");
        message[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes.extend(message);
    }
    bytes
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Ok(request) = UpdateNetworkRequest::parse_from_bytes(bytes) else { return };
    let addresses = request.interfaces.iter().map(|interface| interface.addresses.len()).sum::<usize>();
    // The agent may send each route twice.
    let requests = addresses + 2 * request.routes.len() + request.neighbours.len() + request.rules.len() + 1;
    if requests > MAX_REQUESTS {
        return;
    }
    let (ours, theirs) = UnixDatagram::pair().expect("create a socket pair");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("set non-blocking mode");
    }
    for sequence in (1..).take(requests) {
        theirs.send(&answer(sequence, &[2, 0, 0, 0, 0, 1])).expect("send an answer");
    }
    let _ = add_network(request, &Netlink::over(OwnedFd::from(ours)));
    let mut buffer = vec![0; 1 << 17];
    while let Ok(length) = theirs.recv(&mut buffer) {
        let message = &buffer[..length];
        let stated = message.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes) as usize);
        assert_eq!(
            stated,
            Some(length),
            "the length field of a netlink message differs from the length of the message"
        );
    }
}
