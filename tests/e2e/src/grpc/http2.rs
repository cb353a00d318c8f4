//! A minimal gRPC client over HTTP/2 on a Unix socket (gRPC's PROTOCOL-HTTP2.md). It supports unary calls and server
//! streaming.

use std::cell::RefCell;
use std::fmt;
use std::io::Cursor;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use h2::RecvStream;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

/// Status of a failed call.
#[derive(Debug, Clone)]
pub struct Status {
    /// gRPC status code.
    pub code: u32,
    /// Error message of the server or the transport.
    pub message: String,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code {}: {}", self.code, self.message)
    }
}

impl Status {
    /// The status of a call that has no response within its limit.
    pub fn no_response(limit: Duration) -> Self {
        Self { code: DEADLINE_EXCEEDED, message: format!("{NO_RESPONSE} {limit:?}") }
    }

    /// Returns whether the client itself has ended the call at its limit.
    pub fn is_deadline(&self) -> bool {
        self.code == DEADLINE_EXCEEDED && self.message.starts_with(NO_RESPONSE)
    }
}

/// Begin of the message of [`Status::no_response`].
const NO_RESPONSE: &str = "no response within";
/// gRPC status codes.
const DEADLINE_EXCEEDED: u32 = 4;
const UNAVAILABLE: u32 = 14;

fn unavailable(error: impl fmt::Display) -> Status {
    Status { code: UNAVAILABLE, message: error.to_string() }
}

/// Sends requests on a connection.
type Client = SendRequest<Cursor<Vec<u8>>>;

/// A connection for unary calls, and the Tokio runtime that drives the connection during a call.
struct Connection {
    runtime: Runtime,
    socket: String,
    client: Client,
}

thread_local! {
    /// The connection that the thread's calls reuse. A test makes hundreds of calls, and connecting takes longer than
    /// most calls.
    static CONNECTION: RefCell<Option<Connection>> = const { RefCell::new(None) };
}

impl Connection {
    fn open(socket: &str) -> Result<Self, Status> {
        let runtime = runtime();
        let client = runtime.block_on(connect(socket))?;
        Ok(Self { runtime, socket: socket.to_owned(), client })
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Closes the thread's connection. Call this function before the server is stopped, because the server may wait for its
/// clients to disconnect. The next call then opens a new connection. On the old connection, the next call would fail.
pub fn disconnect() {
    CONNECTION.take();
}

/// Calls `path` with one message and returns the response message.
pub fn unary(
    socket: &str,
    namespace: Option<&str>,
    path: &str,
    message: Vec<u8>,
    limit: Duration,
) -> Result<Vec<u8>, Status> {
    let connection = match CONNECTION.take().filter(|connection| connection.socket == socket) {
        Some(connection) => connection,
        None => Connection::open(socket)?,
    };
    let call = exchange(connection.client.clone(), namespace, path, message);
    let result = connection
        .runtime
        .block_on(async { tokio::time::timeout(limit, call).await })
        .unwrap_or_else(|_| Err(Status::no_response(limit)));
    // The connection is kept only if the transport had no error. Otherwise the next call connects again.
    if !matches!(&result, Err(Status { code: UNAVAILABLE | DEADLINE_EXCEEDED, .. })) {
        CONNECTION.set(Some(connection));
    }
    result
}

/// Calls `path` with one message. Forwards the response messages to the returned receiver, until the server closes the
/// stream or the receiver is dropped.
pub fn stream(socket: &str, path: &str, message: Vec<u8>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    let (socket, path) = (socket.to_owned(), path.to_owned());
    thread::spawn(move || {
        if let Err(status) = runtime().block_on(listen(&socket, &path, message, &sender)) {
            eprintln!("{path} failed: {status}");
        }
    });
    receiver
}

async fn listen(socket: &str, path: &str, message: Vec<u8>, to: &Sender<Vec<u8>>) -> Result<(), Status> {
    let client = connect(socket).await?;
    let mut body = send(client, None, path, message).await?.await.map_err(unavailable)?.into_body();
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(unavailable)?;
        let _ = body.flow_control().release_capacity(chunk.len());
        data.extend_from_slice(&chunk);
        while let Some((message, rest)) = split_message(&data) {
            if to.send(message).is_err() {
                return Ok(());
            }
            data = rest;
        }
    }
    Ok(())
}

/// Splits the first message off the received data. Returns the message and the remaining data, or `None` if the message
/// is incomplete.
fn split_message(data: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let length: [u8; 4] = data.get(1..5)?.try_into().ok()?;
    let end = 5 + u32::from_be_bytes(length) as usize;
    Some((data.get(5..end)?.to_vec(), data[end..].to_vec()))
}

async fn exchange(client: Client, namespace: Option<&str>, path: &str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
    let answer = send(client, namespace, path, message).await?.await.map_err(unavailable)?;
    let headers = answer.headers().clone();
    let (data, trailers) = collect(answer.into_body()).await?;
    let status =
        status(&trailers).or_else(|| status(&headers)).unwrap_or_else(|| unavailable("the response has no status"));
    if status.code != 0 {
        return Err(status);
    }
    split_message(&data).map(|(message, _)| message).ok_or_else(|| unavailable("the response has no message"))
}

/// Connects to a server. A Tokio task drives the connection.
async fn connect(socket: &str) -> Result<Client, Status> {
    let stream = UnixStream::connect(socket).await.map_err(unavailable)?;
    let (client, connection) = h2::client::Builder::new().handshake(stream).await.map_err(unavailable)?;
    tokio::spawn(connection);
    Ok(client)
}

async fn send(client: Client, namespace: Option<&str>, path: &str, message: Vec<u8>) -> Result<ResponseFuture, Status> {
    let mut client = client.ready().await.map_err(unavailable)?;
    let mut request = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(namespace) = namespace {
        request = request.header("containerd-namespace", namespace);
    }
    let request = request.body(()).map_err(unavailable)?;
    let (answer, mut body) = client.send_request(request, false).map_err(unavailable)?;
    // A length-prefixed message starts with one byte for "not compressed" and four bytes for the length.
    let mut framed = vec![0];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    body.send_data(Cursor::new(framed), true).map_err(unavailable)?;
    Ok(answer)
}

async fn collect(mut body: RecvStream) -> Result<(Vec<u8>, HeaderMap), Status> {
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(unavailable)?;
        let _ = body.flow_control().release_capacity(chunk.len());
        data.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await.map_err(unavailable)?.unwrap_or_default();
    Ok((data, trailers))
}

fn status(headers: &HeaderMap) -> Option<Status> {
    let code = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message").map(|text| unescape(text.as_bytes())).unwrap_or_default();
    Some(Status { code, message })
}

/// Decodes percent-encoding.
fn unescape(text: &[u8]) -> String {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let escaped = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        (out, rest) = match escaped {
            Some(byte) if *first == b'%' => ([out, vec![byte]].concat(), &after[2..]),
            _ => ([out, vec![*first]].concat(), after),
        };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::net::UnixListener;

    use super::*;

    #[test]
    fn unescape_decodes_percent_encoding() {
        assert_eq!(unescape(b"a%20b%0A%"), "a b\n%");
    }

    #[test]
    fn split_message_returns_none_for_an_incomplete_message() {
        assert_eq!(split_message(&[0, 0, 0, 0, 2, 7, 8, 9]), Some((vec![7, 8], vec![9])));
        assert_eq!(split_message(&[0, 0, 0, 0, 2, 7]), None);
        assert_eq!(split_message(&[0, 0]), None);
    }

    /// Serves requests on a socket. Sends each message back to the client, with the status 5 for the path `/fails`.
    /// Closes the connection after a request for the path `/closes`. The returned value counts the connections.
    fn serve(socket: &Path) -> Arc<AtomicU32> {
        let runtime = runtime();
        let listener = runtime.block_on(async { UnixListener::bind(socket).unwrap() });
        let connections = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&connections);
        thread::spawn(move || {
            runtime.block_on(async {
                loop {
                    let stream = listener.accept().await.unwrap().0;
                    count.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(serve_connection(stream));
                }
            });
        });
        connections
    }

    async fn serve_connection(stream: UnixStream) {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut answer))) = connection.accept().await {
            let path = request.uri().path().to_owned();
            if path == "/closes" {
                return;
            }
            let mut body = request.into_body();
            // A task serves the request, because the request's body arrives only while `accept` drives the connection.
            tokio::spawn(async move {
                let message = body.data().await.unwrap().unwrap();
                let mut sending = answer.send_response(http::Response::new(()), false).unwrap();
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", if path == "/fails" { "5" } else { "0" }.parse().unwrap());
                sending.send_data(message, false).unwrap();
                sending.send_trailers(trailers).unwrap();
            });
        }
    }

    #[test]
    fn unary_reuses_the_connection_until_the_connection_ends() {
        let socket = std::env::temp_dir().join(format!("husk-e2e-http2-{}", std::process::id()));
        let connections = serve(&socket);
        let call = |path: &str| unary(&socket.to_string_lossy(), None, path, vec![7], Duration::from_secs(10));
        let opened = || connections.load(Ordering::Relaxed);
        assert_eq!(call("/a").unwrap(), [7]);
        assert_eq!(call("/fails").unwrap_err().code, 5);
        assert_eq!(call("/b").unwrap(), [7]);
        assert_eq!(opened(), 1);
        assert_eq!(call("/closes").unwrap_err().code, UNAVAILABLE);
        assert_eq!(call("/c").unwrap(), [7]);
        assert_eq!(opened(), 2);
        disconnect();
        assert_eq!(call("/d").unwrap(), [7]);
        assert_eq!(opened(), 3);
        std::fs::remove_file(&socket).unwrap();
    }
}
