//! Copies bytes between a stream and a process's pipe or terminal until one side closes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use husk_base::sys::fd::set_nonblocking;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Size of one read, in bytes. The kernel's vsock packets carry at most 64 KiB.
const CHUNK: usize = 64 * 1024;
/// Capacity of a pipe, in bytes. The capacity exceeds a chunk, so that the process can write while the agent sends a
/// chunk.
pub const PIPE_BYTES: libc::c_int = 256 * 1024;

/// Either side of a relay, registered with the async runtime.
pub type Endpoint = Arc<AsyncFd<File>>;

/// Makes an fd non-blocking and registers it.
pub fn endpoint(fd: OwnedFd) -> io::Result<Endpoint> {
    set_nonblocking(&fd)?;
    Ok(Arc::new(husk_base::async_fd::register(File::from(fd), Interest::READABLE | Interest::WRITABLE)?))
}

/// Copies until `from` reaches its end. After `close` has been notified, copies only data that has already arrived.
///
/// # Errors
/// Returns the first error of either side. EIO from a terminal, or a connection that the peer has closed, counts as the
/// end of `from`.
pub async fn copy(from: &Endpoint, to: &Endpoint, close: &Notify) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut closing = false;
    loop {
        // The buffer is allocated only while there is data, so that the streams of an idle container need no memory.
        let ready = match closing {
            true => None,
            false => tokio::select! {
                biased;
                ready = from.readable() => Some(ready?),
                () = close.notified() => None,
            },
        };
        closing |= ready.is_none();
        if buffer.is_empty() {
            buffer = vec![0; CHUNK];
        }
        let result = match ready {
            Some(mut guard) => match guard.try_io(|fd| fd.get_ref().read(&mut buffer)) {
                Ok(result) => result,
                Err(_) => {
                    buffer = Vec::new();
                    continue;
                }
            },
            None => from.get_ref().read(&mut buffer),
        };
        let read = match result {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_end_of_file(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut remaining = buffer.get(..read).unwrap_or_default();
        while !remaining.is_empty() {
            match to.async_io(Interest::WRITABLE, |mut file| file.write(remaining)).await {
                Ok(written) => remaining = remaining.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Relays a process's output to its stream. If the host closes the stream, the agent reads and discards the output,
/// because the process would otherwise block on a full pipe.
pub async fn output(from: Endpoint, to: Endpoint) {
    if let Err(error) = copy(&from, &to, &Notify::new()).await {
        tracing::debug!("failed to relay output: {error}");
        drain(&from).await;
    }
    half_close(&to);
}

/// Relays a stream to a process's standard input, until the host half-closes the stream or `close` is notified.
pub async fn input(from: Endpoint, to: Endpoint, close: Arc<Notify>) {
    if let Err(error) = copy(&from, &to, &close).await {
        tracing::debug!("failed to relay input: {error}");
    }
}

async fn drain(from: &Endpoint) {
    let mut buffer = vec![0; 4096];
    while let Ok(1..) = from.async_io(Interest::READABLE, |mut file| file.read(&mut buffer)).await {}
}

/// Signals the end of the data to the peer.
pub fn half_close(stream: &Endpoint) {
    // If `stream` is not a socket, the call fails and has no effect.
    let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
}

fn is_end_of_file(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ECONNRESET | libc::ENOTCONN))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn output_copies_all_bytes_and_half_closes() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let sent: Vec<u8> = (0..3_000_017u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            host.read_to_end(&mut all).unwrap();
            all
        });
        output(endpoint(reader.into()).unwrap(), endpoint(guest.into()).unwrap()).await;
        writing.join().unwrap();
        assert!(reading.join().unwrap() == expected);
    }

    #[tokio::test]
    async fn output_drains_the_pipe_after_the_host_closes() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        drop(host);
        let writing = std::thread::spawn(move || writer.write_all(&vec![1; 4 << 20]).unwrap());
        output(endpoint(reader.into()).unwrap(), endpoint(guest.into()).unwrap()).await;
        writing.join().unwrap();
    }

    #[tokio::test]
    async fn input_copies_data_that_arrived_before_close() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        host.write_all(b"last words").unwrap();
        let close = Arc::new(Notify::new());
        close.notify_one();
        input(endpoint(guest.into()).unwrap(), endpoint(writer.into()).unwrap(), close).await;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }
}
