//! Fuzzes the bytes that the shim receives on systemd's private socket: the reply to AUTH, and D-Bus messages.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use husk_shim::systemd::testing::{Body, Connection};

use crate::input::input;

#[derive(arbitrary::Arbitrary, Debug)]
enum Part {
    /// A D-Bus message. Each header field has a code and a value.
    Message {
        kind: u8,
        fields: Vec<(u8, Field)>,
        body: Vec<u8>,
        padding: u8,
    },
    Raw(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Field {
    Text(String),
    Serial(u8),
    Signature(String),
    Raw(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    refuse: bool,
    parts: Vec<Part>,
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    align(bytes, 4);
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

fn encode(part: &Part) -> Vec<u8> {
    let (kind, fields, body, padding) = match part {
        Part::Raw(bytes) => return bytes.clone(),
        Part::Message { kind, fields, body, padding } => (kind, fields, body, padding),
    };
    let mut header = vec![b'l', kind % 6, 0, 1];
    header.extend((body.len() as u32).to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    for (code, field) in fields.iter().take(8) {
        align(&mut header, 8);
        header.push(code % 10);
        match field {
            Field::Text(value) => {
                header.extend([1, b's', 0]);
                text(&mut header, value);
            }
            Field::Serial(serial) => {
                header.extend([1, b'u', 0]);
                align(&mut header, 4);
                header.extend(u32::from(*serial).to_le_bytes());
            }
            Field::Signature(signature) => {
                header.extend([1, b'g', 0, signature.len() as u8]);
                header.extend(signature.as_bytes());
                header.push(0);
            }
            Field::Raw(bytes) => header.extend(bytes),
        }
    }
    let len = (header.len() - 16) as u32 + u32::from(*padding / 128);
    header[12..16].copy_from_slice(&len.to_le_bytes());
    align(&mut header, 8);
    header.extend(body);
    header
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let (ours, mut theirs) = UnixStream::pair().expect("create a socket pair");
    // The target sends all bytes before the shim's code reads any byte. If the socket were blocking, a write to a full
    // socket buffer would never return.
    theirs.set_nonblocking(true).expect("set non-blocking mode");
    let reply: &[u8] = if input.refuse { b"REJECTED EXTERNAL\r\n" } else { b"OK 0123\r\n" };
    let _ = theirs.write_all(reply);
    for part in input.parts.iter().take(16) {
        let _ = theirs.write_all(&encode(part));
    }
    theirs.shutdown(Shutdown::Write).expect("shut down the sending side of the socket");
    let Ok(mut connection) = Connection::over(ours, Instant::now() + Duration::from_secs(10)) else { return };
    while connection.run_job("a.scope", "StopUnit", "ss", Body::default().text("a.scope").text("replace")).is_ok() {}
}
