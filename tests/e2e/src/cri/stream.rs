//! CRI streams (exec, attach, port-forward) over WebSocket, which containerd's streaming server supports in addition to
//! SPDY.
//!
//! Subprotocol `v4.channel.k8s.io`: each binary message starts with its channel number.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Channels of a remote command (k8s.io/apimachinery, `remotecommand`). For port-forward, channel 0 carries data and
/// channel 1 carries errors.
pub mod channel {
    /// Standard input.
    pub const STDIN: u8 = 0;
    /// Standard output.
    pub const STDOUT: u8 = 1;
    /// Standard error.
    pub const STDERR: u8 = 2;
    /// Status, sent at the end.
    pub const ERROR: u8 = 3;
    /// Terminal sizes, as JSON.
    pub const RESIZE: u8 = 4;
}

/// Timeout of a read.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A connected stream.
pub struct Stream {
    socket: TcpStream,
    /// Received bytes that are not decoded yet.
    buffer: Vec<u8>,
}

impl Stream {
    /// Connects to the URL in the response to an Exec, Attach or PortForward request.
    #[track_caller]
    pub fn connect(url: &str) -> Self {
        let (host, path) = url.strip_prefix("http://").and_then(|url| url.split_once('/')).unwrap();
        let mut socket = TcpStream::connect(host).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        // The request follows RFC 6455, 4.1. Sec-WebSocket-Accept is not verified, because the peer is known.
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nOrigin: http://{host}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut stream = Self { socket, buffer: Vec::new() };
        let head = loop {
            if let Some(end) = stream.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break stream.buffer.drain(..end + 4).collect::<Vec<u8>>();
            }
            assert!(stream.fill(), "the server of {url} closed the connection during the handshake");
        };
        let head = String::from_utf8_lossy(&head).into_owned();
        assert!(
            head.starts_with("HTTP/1.1 101"),
            "{url} did not switch to WebSocket: {head}{}",
            String::from_utf8_lossy(&stream.buffer)
        );
        stream
    }

    /// Reads more bytes into the buffer. Returns false at the end of the stream.
    #[track_caller]
    fn fill(&mut self) -> bool {
        let mut bytes = [0; 64 * 1024];
        match self.socket.read(&mut bytes) {
            Ok(0) => false,
            Ok(read) => {
                self.buffer.extend_from_slice(&bytes[..read]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("failed to read from the stream: {error}"),
        }
    }

    /// Sends a message on a channel.
    #[track_caller]
    pub fn send(&mut self, channel: u8, data: &[u8]) {
        self.frame(2, &[&[channel], data].concat());
    }

    /// Sends a close frame. It closes both directions, because WebSocket has no half-close.
    #[track_caller]
    pub fn close(&mut self) {
        self.frame(8, &[]);
    }

    /// Sends a frame (RFC 6455, 5.2). A masking key of zeros leaves the payload unchanged.
    #[track_caller]
    fn frame(&mut self, opcode: u8, payload: &[u8]) {
        let mut frame = vec![0x80 | opcode];
        match payload.len() {
            length @ 0..126 => frame.push(0x80 | length as u8),
            length @ 126..65536 => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            length => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.socket.write_all(&frame).unwrap();
    }

    /// Receives the next message. Returns its channel and data, or `None` at the end of the stream.
    #[track_caller]
    pub fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((opcode, payload)) = self.next_frame() {
                match (opcode, payload.split_first()) {
                    (8, _) => return None,
                    (1 | 2, Some((channel, data))) => return Some((*channel, data.to_vec())),
                    _ => continue,
                }
            }
            if !self.fill() {
                return None;
            }
        }
    }

    /// Takes the next frame from the buffer. Returns `None` if the buffer has no complete frame.
    fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let (first, second) = (*self.buffer.first()?, *self.buffer.get(1)?);
        let (start, length) = match second & 0x7f {
            126 => (4, usize::from(u16::from_be_bytes(self.buffer.get(2..4)?.try_into().ok()?))),
            127 => (10, usize::try_from(u64::from_be_bytes(self.buffer.get(2..10)?.try_into().ok()?)).ok()?),
            length => (2, usize::from(length)),
        };
        let payload = self.buffer.get(start..start + length)?.to_vec();
        self.buffer.drain(..start + length);
        Some((first & 0xf, payload))
    }

    /// Receives until the data of a channel contains `text`. Returns all data of the channel.
    #[track_caller]
    pub fn wait_for(&mut self, channel: u8, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.receive() {
                Some((from, data)) if from == channel => seen.extend(data),
                Some(_) => {}
                None => panic!("the stream ended before {text:?}; received: {:?}", String::from_utf8_lossy(&seen)),
            }
            let so_far = String::from_utf8_lossy(&seen);
            if so_far.contains(text) {
                return so_far.into_owned();
            }
        }
    }

    /// Receives to the end of the stream. Returns the data of stdout, stderr and the status channel.
    #[track_caller]
    pub fn finish(mut self) -> (Vec<u8>, Vec<u8>, String) {
        let (mut out, mut err, mut status) = (Vec::new(), Vec::new(), Vec::new());
        while let Some((channel, data)) = self.receive() {
            match channel {
                channel::STDOUT => out.extend(data),
                channel::STDERR => err.extend(data),
                channel::ERROR => status.extend(data),
                _ => {}
            }
        }
        (out, err, String::from_utf8_lossy(&status).into_owned())
    }
}
