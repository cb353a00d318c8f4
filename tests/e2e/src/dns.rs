//! A temporary DNS server on the node, over UDP (RFC 1035, RFC 3596).

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// Length of a message header, in bytes.
const HEADER_LEN: usize = 12;
/// Response code for a name that does not exist.
const NXDOMAIN: u8 = 3;

/// A running DNS server. Dropping this value stops the server.
pub struct Dns {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    /// Serves `names` on port 53 of the address `at`. Responds to questions about other names with NXDOMAIN.
    #[track_caller]
    pub fn serve(at: IpAddr, names: Vec<(String, IpAddr)>) -> Self {
        let socket = UdpSocket::bind((at, 53)).unwrap();
        let address = socket.local_addr().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        let thread = thread::spawn(move || {
            let mut message = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut message) {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                if let Some(answer) = answer(&message[..length], &names) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { address, stopped, thread: Some(thread) }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // The datagram wakes the server thread.
        let sent = UdpSocket::bind((self.address.ip(), 0)).and_then(|socket| socket.send_to(&[0], self.address));
        if let (Ok(_), Some(thread)) = (sent, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Returns the response to a message with one question, or `None` if the message is malformed.
fn answer(message: &[u8], names: &[(String, IpAddr)]) -> Option<Vec<u8>> {
    let (mut at, mut labels) = (HEADER_LEN, Vec::new());
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(message.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let name = labels.join(".");
    let question = message.get(HEADER_LEN..at + 4)?;
    let kind = u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]);
    let known: Vec<&IpAddr> = names.iter().filter(|(known, _)| *known == name).map(|(_, ip)| ip).collect();
    let records: Vec<Vec<u8>> = known.iter().filter_map(|ip| record(ip, kind)).collect();
    let mut answer = message.get(..2)?.to_vec();
    // The flags are: response, authoritative answer, recursion desired and recursion available. The response code
    // follows.
    answer.extend([0x85, 0x80 | if known.is_empty() { NXDOMAIN } else { 0 }]);
    answer.extend([0, 1, 0, u8::try_from(records.len()).ok()?, 0, 0, 0, 0]);
    answer.extend(question);
    answer.extend(records.concat());
    Some(answer)
}

/// Encodes a resource record of the question's type. The record's name is a pointer to the question's name. Returns
/// `None` if `ip` is not an address of the question's type.
fn record(ip: &IpAddr, kind: u16) -> Option<Vec<u8>> {
    let data = match (ip, kind) {
        (IpAddr::V4(ip), 1) => ip.octets().to_vec(),
        (IpAddr::V6(ip), 28) => ip.octets().to_vec(),
        _ => return None,
    };
    let mut record = vec![0xc0, HEADER_LEN as u8];
    record.extend(kind.to_be_bytes());
    // The class is IN, and the TTL is one second.
    record.extend([0, 1, 0, 0, 0, 1, 0, u8::try_from(data.len()).ok()?]);
    record.extend(data);
    Some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_contains_records_of_known_names_only() {
        let names = [("a.b".to_owned(), "10.0.0.1".parse().unwrap())];
        let ask = |name: &[u8], kind: u8| [&[7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], name, &[0, kind, 0, 1]].concat();
        let found = answer(&ask(b"\x01A\x01b\0", 1), &names).unwrap();
        assert_eq!((&found[..4], found[7]), (&[7, 9, 0x85, 0x80][..], 1));
        assert!(found.ends_with(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 0, 0, 1]));
        assert_eq!(answer(&ask(b"\x01a\x01b\0", 28), &names).unwrap()[3..8], [0x80, 0, 1, 0, 0]);
        assert_eq!(answer(&ask(b"\x01c\0", 1), &names).unwrap()[3], 0x83);
        assert!(answer(&[0; 11], &names).is_none());
    }
}
