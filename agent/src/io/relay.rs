//! Copies bytes between a stream and a process's pipe or terminal until one side ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// One read: a vsock packet of this kernel carries at most 64 KiB.
const CHUNK: usize = 64 * 1024;
/// What a pipe holds: room for the writer while a chunk is on its way.
pub const PIPE_BYTES: libc::c_int = 256 * 1024;

/// Either side of a relay, registered with the executor.
pub type End = Arc<AsyncFd<File>>;

/// Registers a non-blocking descriptor.
///
/// # Errors
/// When the descriptor cannot be made non-blocking or be polled.
pub fn end(fd: OwnedFd) -> io::Result<End> {
    // SAFETY: fcntl with these commands takes no pointers; the descriptor is alive.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(Arc::new(crate::io::register(File::from(fd), Interest::READABLE | Interest::WRITABLE)?))
}

/// Copies until `from` ends, or, once `close` is notified, until all that has arrived is written.
///
/// # Errors
/// The first error of either side; a terminal's EIO and a closed peer are ends, not errors.
pub async fn copy(from: &End, to: &End, close: &Notify) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut closing = false;
    loop {
        // The buffer is memory only while there is something to move: an idle container's streams cost none.
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
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_end(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut rest = buffer.get(..read).unwrap_or_default();
        while !rest.is_empty() {
            match to.async_io(Interest::WRITABLE, |mut file| file.write(rest)).await {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A process's output to its stream; when the host stops listening the output is read and dropped, as a pipe that
/// nobody reads would stop the process.
pub async fn output(from: End, to: End) {
    if let Err(error) = copy(&from, &to, &Notify::new()).await {
        tracing::debug!("output stream: {error}");
        drain(&from).await;
    }
    half_close(&to);
}

/// A stream to a process's standard input, until the host half-closes it or `close` asks for the end.
pub async fn input(from: End, to: End, close: Arc<Notify>) {
    if let Err(error) = copy(&from, &to, &close).await {
        tracing::debug!("input stream: {error}");
    }
}

async fn drain(from: &End) {
    let mut buffer = vec![0; 4096];
    while let Ok(1..) = from.async_io(Interest::READABLE, |mut file| file.read(&mut buffer)).await {}
}

/// Tells the peer that nothing more comes.
pub fn half_close(stream: &End) {
    // SAFETY: shutdown takes no pointers; the descriptor is alive. On anything but a socket it fails, harmlessly.
    unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) };
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ECONNRESET | libc::ENOTCONN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[tokio::test]
    async fn every_byte_arrives_and_then_the_end() {
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
        output(end(reader.into()).unwrap(), end(guest.into()).unwrap()).await;
        writing.join().unwrap();
        assert!(reading.join().unwrap() == expected);
    }

    #[tokio::test]
    async fn output_nobody_reads_does_not_stop_the_writer() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        drop(host);
        let writing = std::thread::spawn(move || writer.write_all(&vec![1; 4 << 20]).unwrap());
        output(end(reader.into()).unwrap(), end(guest.into()).unwrap()).await;
        writing.join().unwrap();
    }

    #[tokio::test]
    async fn closing_input_writes_what_has_arrived() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        host.write_all(b"last words").unwrap();
        let close = Arc::new(Notify::new());
        close.notify_one();
        input(end(guest.into()).unwrap(), end(writer.into()).unwrap(), close).await;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }
}
