//! CRI streams (exec, attach, port-forward) over WebSocket, as containerd's streaming server speaks it beside SPDY.
//!
//! Subprotocol `v4.channel.k8s.io`: every binary message starts with its channel's number.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Channels of a remote command (k8s.io/apimachinery, `remotecommand`); for port-forward 0 is data, 1 errors.
pub mod channel {
    /// Standard input.
    pub const STDIN: u8 = 0;
    /// Standard output.
    pub const STDOUT: u8 = 1;
    /// Standard error.
    pub const STDERR: u8 = 2;
    /// The status, at the end.
    pub const ERROR: u8 = 3;
    /// Terminal sizes, as JSON.
    pub const RESIZE: u8 = 4;
}

/// How long nothing may come.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A connected stream.
pub struct Stream {
    socket: TcpStream,
    rest: Vec<u8>,
}

impl Stream {
    /// Connects to the URL that an Exec, Attach or PortForward request was answered with.
    #[track_caller]
    pub fn connect(url: &str) -> Self {
        let (host, path) = url.strip_prefix("http://").and_then(|url| url.split_once('/')).unwrap();
        let mut socket = TcpStream::connect(host).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        // RFC 6455, 4.1. The key's answer is not checked: the peer is known.
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nOrigin: http://{host}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut stream = Self { socket, rest: Vec::new() };
        let head = loop {
            if let Some(end) = stream.rest.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break stream.rest.drain(..end + 4).collect::<Vec<u8>>();
            }
            assert!(stream.fill(), "{url}: closed during the handshake");
        };
        let head = String::from_utf8_lossy(&head).into_owned();
        assert!(head.starts_with("HTTP/1.1 101"), "{url}: {head}{}", String::from_utf8_lossy(&stream.rest));
        stream
    }

    /// Reads more; false at the end.
    #[track_caller]
    fn fill(&mut self) -> bool {
        let mut buffer = [0; 64 * 1024];
        match self.socket.read(&mut buffer) {
            Ok(0) => false,
            Ok(read) => {
                self.rest.extend_from_slice(&buffer[..read]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing comes on the stream: {error}"),
        }
    }

    /// Sends a message on a channel.
    #[track_caller]
    pub fn send(&mut self, channel: u8, data: &[u8]) {
        self.frame(2, &[&[channel], data].concat());
    }

    /// Says that no more will come, as WebSocket does: for both directions.
    #[track_caller]
    pub fn close(&mut self) {
        self.frame(8, &[]);
    }

    /// RFC 6455, 5.2; a mask of zeros leaves the bytes as they are.
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

    /// The next message: its channel and data; nothing at the end.
    #[track_caller]
    pub fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((opcode, payload)) = self.take() {
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

    /// A whole frame, if one is there.
    fn take(&mut self) -> Option<(u8, Vec<u8>)> {
        let (first, second) = (*self.rest.first()?, *self.rest.get(1)?);
        let (start, length) = match second & 0x7f {
            126 => (4, usize::from(u16::from_be_bytes(self.rest.get(2..4)?.try_into().ok()?))),
            127 => (10, usize::try_from(u64::from_be_bytes(self.rest.get(2..10)?.try_into().ok()?)).ok()?),
            length => (2, usize::from(length)),
        };
        let payload = self.rest.get(start..start + length)?.to_vec();
        self.rest.drain(..start + length);
        Some((first & 0xf, payload))
    }

    /// Reads a channel until what came on it contains `text`; gives all of it.
    #[track_caller]
    pub fn wait_for(&mut self, channel: u8, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.receive() {
                Some((from, data)) if from == channel => seen.extend(data),
                Some(_) => {}
                None => panic!("ended before {text:?}: {:?}", String::from_utf8_lossy(&seen)),
            }
            let so_far = String::from_utf8_lossy(&seen);
            if so_far.contains(text) {
                return so_far.into_owned();
            }
        }
    }

    /// Reads to the end; gives what came on stdout, stderr and the status channel.
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
