//! Copies data between a stream to the guest and the fifo, pipe or file that containerd or a logger uses.
//!
//! The shim moves stdin with splice(2). The shim also uses splice(2) for large amounts of output to a fifo or pipe.
//! With splice(2), the data is not copied to the shim's memory.
//!
//! For small amounts of output, the shim uses read(2) and write(2) instead of splice(2). A spliced fragment occupies a
//! whole pipe buffer, and a pipe has only 16 buffers by default. With splice(2) alone, a container whose output nobody
//! reads would block after a few lines. With write(2), the container blocks after 64 KiB.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use husk_base::sys::fd::unread_bytes;
use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::write,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};

use crate::blocking;

/// The shim splices output if the socket's receive queue contains at least this many bytes.
const SPLICE_THRESHOLD: usize = 16 << 10;
/// Maximum number of bytes per splice: the default capacity of a pipe.
const SPLICE_MAX: usize = 64 << 10;

/// The destination of an output stream.
#[derive(Debug)]
pub enum Sink {
    /// A fifo or pipe.
    Pipe(AsyncFd<OwnedFd>),
    /// A file.
    File(Arc<File>),
}

/// Result of a non-blocking splice.
enum Spliced {
    /// Number of bytes that were moved.
    Bytes(usize),
    /// The source is at EOF.
    End,
    /// The pipe is not ready.
    PipeNotReady,
    /// The splice returned EAGAIN, but now both sides are ready.
    Retry,
}

/// Copies output from `stream` to `sink` until EOF.
///
/// After a write error, reads and discards the remaining output. If the output were not read, a dead logger would block
/// the container.
pub async fn output(stream: &UnixStream, sink: Sink, copied: &AtomicU64) {
    let result = match sink {
        Sink::Pipe(pipe) => to_pipe(stream, &pipe, copied).await,
        Sink::File(file) => to_file(stream, file, copied).await,
    };
    if result.is_err() {
        let _ = discard(stream, copied).await;
    }
}

async fn to_pipe(stream: &UnixStream, pipe: &AsyncFd<OwnedFd>, copied: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; SPLICE_THRESHOLD];
    loop {
        stream.readable().await?;
        if unread_bytes(stream)? < SPLICE_THRESHOLD {
            match stream.try_read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => write_all(pipe, buffer.get(..count).unwrap_or_default(), copied).await?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Treat a read error as EOF. For example, the VM may have ended.
                Err(_) => return Ok(()),
            }
            continue;
        }
        let mut writable = pipe.writable().await?;
        let result = stream.try_io(Interest::READABLE, || {
            let (from, to) = (stream.as_fd(), pipe.get_ref().as_fd());
            try_splice(from, to, from, PollFlags::POLLIN, to, PollFlags::POLLOUT)
        });
        match result {
            Ok(Spliced::Bytes(count)) => add(copied, count),
            Ok(Spliced::End) => return Ok(()),
            Ok(Spliced::PipeNotReady) => writable.clear_ready(),
            Ok(Spliced::Retry) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        // Yield to other tasks, because the loop does not wait while both sides are ready.
        tokio::task::yield_now().await;
    }
}

/// Copies stdin from `fifo` to `stream` until EOF. Then shuts down the write side of `stream`.
pub async fn input(fifo: &AsyncFd<OwnedFd>, stream: &UnixStream) {
    if from_pipe(fifo, stream).await.is_ok() {
        let _ = nix::sys::socket::shutdown(stream.as_raw_fd(), nix::sys::socket::Shutdown::Write);
    }
}

async fn from_pipe(fifo: &AsyncFd<OwnedFd>, stream: &UnixStream) -> io::Result<()> {
    loop {
        let mut readable = fifo.readable().await?;
        stream.writable().await?;
        let result = stream.try_io(Interest::WRITABLE, || {
            let (from, to) = (fifo.get_ref().as_fd(), stream.as_fd());
            try_splice(from, to, to, PollFlags::POLLOUT, from, PollFlags::POLLIN)
        });
        match result {
            Ok(Spliced::End) => return Ok(()),
            Ok(Spliced::PipeNotReady) => readable.clear_ready(),
            Ok(Spliced::Bytes(_) | Spliced::Retry) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        tokio::task::yield_now().await;
    }
}

/// Splices once. Returns `WouldBlock` if the socket is not ready, and [`Spliced::PipeNotReady`] if the pipe is not
/// ready.
///
/// EAGAIN does not tell which side would block. Therefore, this function polls both sides after EAGAIN.
fn try_splice(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    socket_event: PollFlags,
    pipe: BorrowedFd<'_>,
    pipe_event: PollFlags,
) -> io::Result<Spliced> {
    loop {
        match splice(from, None, to, None, SPLICE_MAX, SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE) {
            Ok(0) => return Ok(Spliced::End),
            Ok(count) => return Ok(Spliced::Bytes(count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut fds = [PollFd::new(socket, socket_event), PollFd::new(pipe, pipe_event)];
    poll(&mut fds, PollTimeout::ZERO)?;
    // A hang-up or an error counts as ready, because the next splice then returns 0 or the error.
    let [socket, pipe] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
    match (socket, pipe) {
        (false, _) => Err(io::ErrorKind::WouldBlock.into()),
        (true, false) => Ok(Spliced::PipeNotReady),
        (true, true) => Ok(Spliced::Retry),
    }
}

async fn write_all(pipe: &AsyncFd<OwnedFd>, mut bytes: &[u8], copied: &AtomicU64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = pipe.async_io(Interest::WRITABLE, |fd| Ok(write(fd, bytes)?)).await?;
        add(copied, count);
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Copies output from `stream` to a file. The writes run on other threads, because a write to a file
/// blocks and never returns EAGAIN.
async fn to_file(stream: &UnixStream, file: Arc<File>, copied: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; SPLICE_MAX];
    loop {
        stream.readable().await?;
        let count = match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Ok(()),
        };
        let file = Arc::clone(&file);
        let written = blocking::spawn(move || {
            let result = (&*file).write_all(buffer.get(..count).unwrap_or_default());
            (buffer, result)
        });
        let (returned, result) = written.await?;
        buffer = returned;
        result?;
        add(copied, count);
    }
}

async fn discard(stream: &UnixStream, copied: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; SPLICE_THRESHOLD];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => add(copied, count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn add(copied: &AtomicU64, count: usize) {
    copied.fetch_add(count as u64, Ordering::Relaxed);
}
