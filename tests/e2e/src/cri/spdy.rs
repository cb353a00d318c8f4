//! CRI port forwarding as kubectl does it. One SPDY/3.1 connection carries many forwarded connections. Each forwarded
//! connection supports half-close.
//!
//! Each forwarded connection consists of a data stream and an error stream (k8s.io/apimachinery,
//! `pkg/util/httpstream/spdy`; k8s.io/kubelet, `pkg/cri/streaming/portforward`). The frames follow the SPDY draft 3.1.
//! Flow control is not implemented.

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use husk_base::sync::lock;

/// Timeout of a read.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Types of control frames (SPDY draft 3.1, 2.6).
const SYN_STREAM: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// Flag of the last frame that a peer sends on a stream (FLAG_FIN).
const FIN: u8 = 1;
/// Maximum payload of a sent frame, in bytes.
const MAX_PAYLOAD: usize = 32 * 1024;

/// For each stream id, the sender of the channel to which the stream's data goes. A stream is removed at its end.
type Streams = Arc<Mutex<HashMap<u32, Sender<Vec<u8>>>>>;

/// The connection to the streaming server.
pub struct PortForward {
    writer: Arc<Mutex<Writer>>,
    streams: Streams,
}

struct Writer {
    socket: TcpStream,
    /// Next stream id. A client's stream ids are odd.
    next: u32,
    /// Whether the zlib stream header (RFC 1950) has been sent. All SYN_STREAM headers share one zlib stream.
    zlib_started: bool,
}

/// A connection to a port of the pod.
pub struct Connection {
    writer: Arc<Mutex<Writer>>,
    id: u32,
    data: Receiver<Vec<u8>>,
    error: Receiver<Vec<u8>>,
}

/// The sending half of a connection, which can be moved to another thread.
pub struct SendHalf {
    writer: Arc<Mutex<Writer>>,
    id: u32,
}

impl PortForward {
    /// Connects to the URL in the response to a PortForward request.
    #[track_caller]
    pub fn connect(url: &str) -> Self {
        let (host, path) = url.strip_prefix("http://").and_then(|url| url.split_once('/')).unwrap();
        let mut socket = TcpStream::connect(host).unwrap();
        let request = format!(
            "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: portforward.k8s.io\r\nContent-Length: 0\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(socket.try_clone().unwrap());
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            reader
                .read_exact(&mut byte)
                .unwrap_or_else(|error| panic!("failed to read the response of {url}: {error}"));
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        assert!(head.starts_with("HTTP/1.1 101"), "{url} did not switch to SPDY: {head}");
        let streams = Streams::default();
        let writer = Arc::new(Mutex::new(Writer { socket, next: 1, zlib_started: false }));
        let (reader_streams, reader_writer) = (Arc::clone(&streams), Arc::clone(&writer));
        thread::spawn(move || {
            while dispatch_frame(&mut reader, &reader_streams, &reader_writer).is_ok() {}
            // Ends all streams, so that their receivers return `None`.
            lock(&reader_streams).clear();
        });
        Self { writer, streams }
    }

    /// Opens a connection to a port of the pod. `number` has to be unique among the connections.
    #[track_caller]
    pub fn open(&self, port: u16, number: u32) -> Connection {
        let mut writer = lock(&self.writer);
        let error = self.stream(&mut writer, "error", port, number);
        // The client sends nothing on the error stream, and therefore closes its own direction at once.
        writer.frame(error.0, FIN, &[]).unwrap();
        let data = self.stream(&mut writer, "data", port, number);
        Connection { writer: Arc::clone(&self.writer), id: data.0, data: data.1, error: error.1 }
    }

    #[track_caller]
    fn stream(&self, writer: &mut Writer, kind: &str, port: u16, number: u32) -> (u32, Receiver<Vec<u8>>) {
        let id = writer.next;
        writer.next += 2;
        let (sender, receiver) = channel();
        lock(&self.streams).insert(id, sender);
        writer
            .syn_stream(id, &[("streamtype", kind), ("port", &port.to_string()), ("requestid", &number.to_string())])
            .unwrap();
        (id, receiver)
    }
}

impl Drop for PortForward {
    fn drop(&mut self) {
        let _ = lock(&self.writer).socket.shutdown(Shutdown::Both);
    }
}

impl Connection {
    /// Sends data.
    #[track_caller]
    pub fn send(&self, data: &[u8]) {
        self.send_half().send(data);
    }

    /// Half-closes the connection: data can still be received.
    #[track_caller]
    pub fn finish(&self) {
        self.send_half().finish();
    }

    /// Returns the sending half.
    pub fn send_half(&self) -> SendHalf {
        SendHalf { writer: Arc::clone(&self.writer), id: self.id }
    }

    /// Receives the next data. Returns `None` at the end of the stream.
    #[track_caller]
    pub fn receive(&self) -> Option<Vec<u8>> {
        receive(&self.data)
    }

    /// Reads to the end.
    #[track_caller]
    pub fn read_to_end(&self) -> Vec<u8> {
        std::iter::from_fn(|| self.receive()).flatten().collect()
    }

    /// Reads at least `length` bytes.
    #[track_caller]
    pub fn read(&self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend(
                self.receive().unwrap_or_else(|| panic!("the connection ended after {} of {length} bytes", all.len())),
            );
        }
        all
    }

    /// Waits for the end of the connection. Returns the error message, which is empty if there was no error.
    #[track_caller]
    pub fn error(&self) -> String {
        let text: Vec<u8> = std::iter::from_fn(|| receive(&self.error)).flatten().collect();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl SendHalf {
    /// Sends data.
    #[track_caller]
    pub fn send(&self, data: &[u8]) {
        for chunk in data.chunks(MAX_PAYLOAD) {
            lock(&self.writer).frame(self.id, 0, chunk).unwrap();
        }
    }

    /// Half-closes the connection.
    #[track_caller]
    pub fn finish(&self) {
        lock(&self.writer).frame(self.id, FIN, &[]).unwrap();
    }
}

#[track_caller]
fn receive(stream: &Receiver<Vec<u8>>) -> Option<Vec<u8>> {
    match stream.recv_timeout(TIMEOUT) {
        Ok(data) => Some(data),
        Err(RecvTimeoutError::Disconnected) => None,
        Err(RecvTimeoutError::Timeout) => panic!("received no data within {TIMEOUT:?}"),
    }
}

/// Reads a frame and dispatches it to its stream.
fn dispatch_frame(reader: &mut impl Read, streams: &Streams, writer: &Mutex<Writer>) -> std::io::Result<()> {
    let mut head = [0; 8];
    reader.read_exact(&mut head)?;
    let [control, _, _, kind, flags, length @ ..] = head;
    let mut payload = vec![0; length.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte))];
    reader.read_exact(&mut payload)?;
    let first = |bytes: &[u8]| bytes.first_chunk().map_or(0, |word| u32::from_be_bytes(*word) & 0x7fff_ffff);
    if control & 0x80 == 0 {
        let id = first(&head);
        let mut streams = lock(streams);
        if let Some(stream) = streams.get(&id).filter(|_| !payload.is_empty()) {
            // An error means that the receiver was dropped. In this case, nobody needs the data.
            let _ = stream.send(payload);
        }
        if flags & FIN != 0 {
            streams.remove(&id);
        }
        return Ok(());
    }
    match kind {
        RST_STREAM => drop(lock(streams).remove(&first(&payload))),
        PING => lock(writer).socket.write_all(&[&head[..], &payload].concat())?,
        GOAWAY => return Err(std::io::ErrorKind::ConnectionAborted.into()),
        // Ignores SYN_REPLY and all other frames. A SYN_REPLY has only compressed headers, which carry no information.
        _ => {}
    }
    Ok(())
}

impl Writer {
    fn frame(&mut self, id: u32, flags: u8, data: &[u8]) -> std::io::Result<()> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        let mut frame = id.to_be_bytes().to_vec();
        frame.extend([flags, length[1], length[2], length[3]]);
        frame.extend(data);
        self.socket.write_all(&frame)
    }

    /// Sends SYN_STREAM (SPDY draft 3.1, 2.6.1). The headers are in stored zlib blocks (RFC 1950; RFC 1951, 3.2.4).
    /// These blocks need no dictionary. The last block is empty, as after a flush of zlib.
    fn syn_stream(&mut self, id: u32, headers: &[(&str, &str)]) -> std::io::Result<()> {
        let mut plain = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            plain.extend(text.bytes());
        }
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        if !self.zlib_started {
            payload.extend([0x78, 0x01]);
            self.zlib_started = true;
        }
        let length = u16::try_from(plain.len()).unwrap();
        payload.push(0);
        payload.extend(length.to_le_bytes());
        payload.extend((!length).to_le_bytes());
        payload.extend(plain);
        payload.extend([0, 0, 0, 0xff, 0xff]);
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![0x80, 3, 0, SYN_STREAM, 0, size[1], size[2], size[3]];
        frame.extend(payload);
        self.socket.write_all(&frame)
    }
}
