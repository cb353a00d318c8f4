//! Copying between a stream to the guest and containerd's end of it.
//!
//! Between a socket and a pipe splice(2) moves what is large without a copy through this process. What is small is
//! read and written, because each spliced fragment takes one of the pipe's few slots, however short it is: a container
//! nobody reads from would block after a handful of lines instead of 64 KiB.

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::write,
};
use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};

/// From so many bytes waiting in the socket on, splice.
const LARGE: usize = 16 << 10;
/// What one splice moves at most: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// Where the bytes of one stream can go.
#[derive(Debug)]
pub enum Sink {
    /// A fifo or pipe.
    Pipe(AsyncFd<OwnedFd>),
    /// A file.
    File(Arc<File>),
}

/// What became of an attempt to move bytes between two descriptors neither of which may block.
enum Moved {
    /// So many bytes.
    Bytes(usize),
    /// The source is at its end.
    End,
    /// The pipe was not ready.
    Pipe,
    /// One was not ready, and is now.
    Again,
}

/// Copies the guest's output until it ends. What cannot be written any more is read nevertheless, so that the
/// container does not block on a logger that died.
pub async fn output(stream: &UnixStream, sink: Sink, moved: &AtomicU64) {
    let result = match sink {
        Sink::Pipe(pipe) => to_pipe(stream, &pipe, moved).await,
        Sink::File(file) => to_file(stream, file, moved).await,
    };
    if result.is_err() {
        let _ = discard(stream, moved).await;
    }
}

async fn to_pipe(stream: &UnixStream, pipe: &AsyncFd<OwnedFd>, moved: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; LARGE];
    loop {
        stream.readable().await?;
        if waiting(stream.as_fd())? < LARGE {
            match stream.try_read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => write_all(pipe, buffer.get(..count).unwrap_or_default(), moved).await?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The guest is gone: so is its output.
                Err(_) => return Ok(()),
            }
            continue;
        }
        let mut writable = pipe.writable().await?;
        let attempt = stream.try_io(Interest::READABLE, || {
            let (from, to) = (stream.as_fd(), pipe.get_ref().as_fd());
            attempt(from, to, from, PollFlags::POLLIN, to, PollFlags::POLLOUT)
        });
        match attempt {
            Ok(Moved::Bytes(count)) => note(moved, count),
            Ok(Moved::End) => return Ok(()),
            Ok(Moved::Pipe) => writable.clear_ready(),
            Ok(Moved::Again) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        // Splicing never waits while both are ready: others want a turn too.
        tokio::task::yield_now().await;
    }
}

/// Copies what clients write to an input fifo until it ends, then tells the guest so.
pub async fn input(fifo: &AsyncFd<OwnedFd>, stream: &UnixStream) {
    if from_pipe(fifo, stream).await.is_ok() {
        let _ = nix::sys::socket::shutdown(stream.as_raw_fd(), nix::sys::socket::Shutdown::Write);
    }
}

async fn from_pipe(fifo: &AsyncFd<OwnedFd>, stream: &UnixStream) -> io::Result<()> {
    loop {
        let mut readable = fifo.readable().await?;
        stream.writable().await?;
        let attempt = stream.try_io(Interest::WRITABLE, || {
            let (from, to) = (fifo.get_ref().as_fd(), stream.as_fd());
            attempt(from, to, to, PollFlags::POLLOUT, from, PollFlags::POLLIN)
        });
        match attempt {
            Ok(Moved::End) => return Ok(()),
            Ok(Moved::Pipe) => readable.clear_ready(),
            Ok(Moved::Bytes(_) | Moved::Again) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        tokio::task::yield_now().await;
    }
}

/// Splices once. When the kernel says that it would block it does not say on which side, and to wait for the wrong one
/// is to wait for ever: so both are asked. `WouldBlock` is returned for the socket, `Moved::Pipe` for the pipe.
fn attempt(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    socket_event: PollFlags,
    pipe: BorrowedFd<'_>,
    pipe_event: PollFlags,
) -> io::Result<Moved> {
    loop {
        match splice(from, None, to, None, CHUNK, SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE) {
            Ok(0) => return Ok(Moved::End),
            Ok(count) => return Ok(Moved::Bytes(count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut fds = [PollFd::new(socket, socket_event), PollFd::new(pipe, pipe_event)];
    poll(&mut fds, PollTimeout::ZERO)?;
    // Any event counts, a hang-up too: the next attempt then tells.
    let [socket, pipe] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
    match (socket, pipe) {
        (false, _) => Err(io::ErrorKind::WouldBlock.into()),
        (true, false) => Ok(Moved::Pipe),
        (true, true) => Ok(Moved::Again),
    }
}

async fn write_all(pipe: &AsyncFd<OwnedFd>, mut bytes: &[u8], moved: &AtomicU64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = pipe.async_io(Interest::WRITABLE, |fd| Ok(write(fd, bytes)?)).await?;
        note(moved, count);
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Files never would block, they do: a thread of the runtime's blocking pool writes.
async fn to_file(stream: &UnixStream, file: Arc<File>, moved: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        stream.readable().await?;
        let count = match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Ok(()),
        };
        let file = Arc::clone(&file);
        let written = tokio::task::spawn_blocking(move || {
            let result = (&*file).write_all(buffer.get(..count).unwrap_or_default());
            (buffer, result)
        });
        let (back, result) = written.await.map_err(io::Error::other)?;
        buffer = back;
        result?;
        note(moved, count);
    }
}

async fn discard(stream: &UnixStream, moved: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; LARGE];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => note(moved, count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Bytes that wait in a socket (`SIOCINQ`, which is `FIONREAD`).
fn waiting(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes one int, which `count` is.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or_default())
}

/// Lets the runtime wait for a descriptor.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open, is always the same, and goes with the `AsyncFd` that now owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn note(moved: &AtomicU64, count: usize) {
    moved.fetch_add(count as u64, Ordering::Relaxed);
}
