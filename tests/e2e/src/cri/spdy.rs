//! CRI port-forwarding as kubectl does it: many connections over one of SPDY/3.1, each of which may be closed by halves.
//!
//! A stream of data and one for an error make a connection (k8s.io/apimachinery, `pkg/util/httpstream/spdy`;
//! k8s.io/kubelet, `pkg/cri/streaming/portforward`). The frames are those of the SPDY draft 3.1; nobody here keeps windows.

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How long nothing may come.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Types of control frames (SPDY draft 3.1, 2.6).
const SYN_STREAM: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// Flag of the last frame in a direction.
const FIN: u8 = 1;
/// Most that is sent in one frame.
const PIECE: usize = 32 * 1024;

/// What comes for a stream; nothing more after an end.
type Streams = Arc<Mutex<HashMap<u32, Sender<Vec<u8>>>>>;

/// The connection to the streaming server.
pub struct Forward {
    writer: Arc<Mutex<Writer>>,
    streams: Streams,
}

struct Writer {
    socket: TcpStream,
    /// The next stream's; a client's are odd.
    next: u32,
    /// Whether the headers' compression has begun.
    begun: bool,
}

/// A connection to a port of the pod's.
pub struct Connection {
    writer: Arc<Mutex<Writer>>,
    id: u32,
    data: Receiver<Vec<u8>>,
    error: Receiver<Vec<u8>>,
}

/// The end of a connection that sends; it can go to another thread.
pub struct Sending {
    writer: Arc<Mutex<Writer>>,
    id: u32,
}

impl Forward {
    /// Connects to the URL that a PortForward request was answered with.
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
            reader.read_exact(&mut byte).unwrap_or_else(|error| panic!("{url}: {error}"));
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        assert!(head.starts_with("HTTP/1.1 101"), "{url}: {head}");
        let streams = Streams::default();
        let writer = Arc::new(Mutex::new(Writer { socket, next: 1, begun: false }));
        let (of_reader, answers) = (Arc::clone(&streams), Arc::clone(&writer));
        thread::spawn(move || {
            while deal_out(&mut reader, &of_reader, &answers).is_ok() {}
            // Whoever still waits is told that nothing more comes.
            lock(&of_reader).clear();
        });
        Self { writer, streams }
    }

    /// Opens a connection to a port of the pod's; `number` is one that no other connection here has.
    #[track_caller]
    pub fn open(&self, port: u16, number: u32) -> Connection {
        let mut writer = lock(&self.writer);
        let error = self.stream(&mut writer, "error", port, number);
        // Nothing goes this way.
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
            .begin(id, &[("streamtype", kind), ("port", &port.to_string()), ("requestid", &number.to_string())])
            .unwrap();
        (id, receiver)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = lock(&self.writer).socket.shutdown(Shutdown::Both);
    }
}

impl Connection {
    /// Sends.
    #[track_caller]
    pub fn send(&self, data: &[u8]) {
        self.sending().send(data);
    }

    /// Says that no more will be sent; what comes can still be read.
    #[track_caller]
    pub fn finish(&self) {
        self.sending().finish();
    }

    /// The end that sends.
    pub fn sending(&self) -> Sending {
        Sending { writer: Arc::clone(&self.writer), id: self.id }
    }

    /// Reads what comes next; nothing at the end.
    #[track_caller]
    pub fn receive(&self) -> Option<Vec<u8>> {
        receive(&self.data)
    }

    /// Reads to the end.
    #[track_caller]
    pub fn read_to_end(&self) -> Vec<u8> {
        std::iter::from_fn(|| self.receive()).flatten().collect()
    }

    /// Reads so many bytes.
    #[track_caller]
    pub fn read(&self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            all.extend(self.receive().unwrap_or_else(|| panic!("ended after {} of {length} bytes", all.len())));
        }
        all
    }

    /// Waits until the connection has ended; gives what went wrong, or nothing.
    #[track_caller]
    pub fn error(&self) -> String {
        let text: Vec<u8> = std::iter::from_fn(|| receive(&self.error)).flatten().collect();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Sending {
    /// Sends.
    #[track_caller]
    pub fn send(&self, data: &[u8]) {
        for piece in data.chunks(PIECE) {
            lock(&self.writer).frame(self.id, 0, piece).unwrap();
        }
    }

    /// Says that no more will be sent.
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
        Err(RecvTimeoutError::Timeout) => panic!("nothing comes for {TIMEOUT:?}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a frame and gives it to whom it is for.
fn deal_out(reader: &mut impl Read, streams: &Streams, writer: &Mutex<Writer>) -> std::io::Result<()> {
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
            // Whoever does not want to read it any more has dropped the other end.
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
        // What a SYN_REPLY says is compressed, and nothing.
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

    /// SYN_STREAM (2.6.1), its headers in blocks that zlib stores as they are (RFC 1950, RFC 1951, 3.2.4): that takes no
    /// dictionary. The empty block at the end is what zlib's own flush writes.
    fn begin(&mut self, id: u32, headers: &[(&str, &str)]) -> std::io::Result<()> {
        let mut plain = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            plain.extend(text.bytes());
        }
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        if !self.begun {
            payload.extend([0x78, 0x01]);
            self.begun = true;
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
