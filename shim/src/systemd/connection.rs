//! A D-Bus connection to systemd over a Unix socket, for a few calls in sequence.
//!
//! Calls block, at most until the connection's deadline. Therefore, do not make calls in an async task.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::message::{self, Body, Call, FIXED_HEADER, Malformed, Reader, Received};

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Maximum length of systemd's reply to AUTH, in bytes.
const MAX_AUTH_REPLY: usize = 256;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection to the socket failed.
    #[error("failed to connect to systemd's socket {path}")]
    Connect {
        /// The socket.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// systemd rejected the authentication.
    #[error("failed to authenticate to systemd: {0}")]
    Authentication(String),
    /// The connection broke, or the deadline passed.
    #[error("failed to communicate with systemd")]
    Io(#[from] io::Error),
    /// The reply is malformed.
    #[error("failed to parse systemd's reply")]
    Malformed(#[from] Malformed),
    /// The method returned an error.
    #[error("{text} ({name})")]
    Failed {
        /// The D-Bus error name.
        name: String,
        /// systemd's message.
        text: String,
    },
    /// The job did not end with the result `done`.
    #[error("the job of unit {unit} ended with result {result:?}")]
    Job {
        /// The unit.
        unit: String,
        /// The job's result (`canceled`, `timeout`, `failed`, `dependency`, …).
        result: String,
    },
}

impl CallError {
    /// Returns whether systemd returned the D-Bus error `error`.
    pub fn has_name(&self, error: &str) -> bool {
        matches!(self, Self::Failed { name, .. } if name == error)
    }

    /// Returns whether systemd closed the connection. systemd closes its connections when it re-executes itself.
    pub fn is_disconnected(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        matches!(self, Self::Io(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
    }
}

/// An authenticated connection to systemd.
pub struct Connection {
    stream: UnixStream,
    deadline: Instant,
    serial: u32,
    /// The jobs that have ended, with their results.
    ended_jobs: Vec<(String, String)>,
}

impl Connection {
    /// Connects and authenticates as this process's user. `timeout` limits the total time for connecting and for all
    /// calls.
    pub fn open(path: &Path, timeout: Duration) -> Result<Self, CallError> {
        let deadline = Instant::now() + timeout;
        let stream = connect(path, deadline)
            .map_err(|source| CallError::Connect { path: path.display().to_string(), source })?;
        Self::over(stream, deadline)
    }

    /// Authenticates on a connected socket.
    pub fn over(stream: UnixStream, deadline: Instant) -> Result<Self, CallError> {
        let mut connection = Self { stream, deadline, serial: 0, ended_jobs: Vec::new() };
        connection.authenticate()?;
        Ok(connection)
    }

    /// Authenticates with the socket's credentials (D-Bus Specification, "Authentication Protocol", EXTERNAL).
    ///
    /// Sends AUTH and BEGIN in one write, as libsystemd does. Otherwise, systemd could read BEGIN together with the
    /// first message. systemd would then ignore the first message until more data arrives
    /// (libsystemd/sd-bus/bus-socket.c).
    fn authenticate(&mut self) -> Result<(), CallError> {
        let user = nix::unistd::geteuid().to_string();
        let hex: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
        self.write(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())?;
        let mut line = Vec::new();
        // Do not read beyond the line, because messages follow the line.
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.read(&mut byte)?;
            line.extend(byte);
            if line.len() > MAX_AUTH_REPLY {
                return Err(Malformed.into());
            }
        }
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("OK ") { Ok(()) } else { Err(CallError::Authentication(line.trim_end().to_owned())) }
    }

    /// Calls a method of systemd's manager object, and returns the body of the reply.
    pub fn call(&mut self, member: &str, signature: &str, body: Body) -> Result<Vec<u8>, CallError> {
        self.serial += 1;
        let serial = self.serial;
        let call = Call {
            path: "/org/freedesktop/systemd1",
            interface: MANAGER,
            member,
            destination: "org.freedesktop.systemd1",
            signature,
            body,
        };
        self.write(&call.encode(serial))?;
        loop {
            match self.receive()? {
                Received::Return { to, body } if to == serial => return Ok(body),
                Received::Error { to, name, text } if to == serial => return Err(CallError::Failed { name, text }),
                other => self.record_job(other)?,
            }
        }
    }

    /// Calls a method that starts a job, and waits until the job ends.
    ///
    /// # Errors
    /// [`CallError::Job`] if the job's result is not `done`. The errors of [`Connection::call`] are also possible.
    pub fn run_job(&mut self, unit: &str, member: &str, signature: &str, body: Body) -> Result<(), CallError> {
        let body = self.call(member, signature, body)?;
        let job = Reader::new(&body).text()?.to_owned();
        loop {
            if let Some((_, result)) = self.ended_jobs.iter().find(|(ended, _)| *ended == job) {
                let (unit, result) = (unit.to_owned(), result.clone());
                return if result == "done" { Ok(()) } else { Err(CallError::Job { unit, result }) };
            }
            let received = self.receive()?;
            self.record_job(received)?;
        }
    }

    /// Records the result of a job if the message is a JobRemoved signal.
    fn record_job(&mut self, received: Received) -> Result<(), CallError> {
        if let Received::Signal { member, body } = received
            && member == "JobRemoved"
        {
            let mut reader = Reader::new(&body);
            let (_id, job, _unit, result) = (reader.u32()?, reader.text()?, reader.text()?, reader.text()?);
            self.ended_jobs.push((job.to_owned(), result.to_owned()));
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Received, CallError> {
        let mut message = vec![0; FIXED_HEADER];
        self.read(&mut message)?;
        let fixed: &[u8; FIXED_HEADER] = message.first_chunk().ok_or(Malformed)?;
        let rest = message::remaining_length(fixed)?;
        message.resize(FIXED_HEADER + rest, 0);
        self.read(message.get_mut(FIXED_HEADER..).unwrap_or_default())?;
        Ok(message::decode(&message)?)
    }

    fn read(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.remaining_time()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => buffer = buffer.get_mut(length..).unwrap_or_default(),
                Err(error) => check_retry(error)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.remaining_time()?))?;
            // The write does not cause a SIGPIPE, because std sends with MSG_NOSIGNAL.
            match self.stream.write(bytes) {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) => check_retry(error)?,
            }
        }
        Ok(())
    }

    fn remaining_time(&self) -> io::Result<Duration> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(remaining) }
    }
}

/// Connects to systemd's socket. If the connection is refused, waits until systemd listens or `deadline` passes.
///
/// Connections are refused while systemd re-executes itself. When systemd listens on the new socket, systemd updates
/// the socket's time stamps. The update wakes clients that wait with inotify (src/core/dbus.c, bus_init_private).
fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let refused = |result: &io::Result<_>| {
        result.as_ref().is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    let first = UnixStream::connect(path);
    if !refused(&first) {
        return first;
    }
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let dir = path.parent().unwrap_or_else(|| Path::new("/"));
    inotify.add_watch(dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ATTRIB)?;
    loop {
        let next = UnixStream::connect(path);
        let not_found = next.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let remaining = deadline.saturating_duration_since(Instant::now());
        if !(not_found || refused(&next)) || remaining.is_zero() {
            return next;
        }
        let mut wanted = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wanted, PollTimeout::try_from(remaining).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match inotify.read_events() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns `Ok` if the operation must be retried. Converts EAGAIN, which reports a socket timeout, to `TimedOut`.
fn check_retry(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn connect_waits_for_a_new_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let late = connect(&path, Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::ConnectionRefused);
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || connect(&path, Instant::now() + Duration::from_secs(20))
        });
        std::thread::sleep(Duration::from_millis(20));
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        // Cause an IN_ATTRIB event, as systemd does when it updates the socket's time stamps.
        nix::unistd::chown(&path, Some(nix::unistd::geteuid()), None).unwrap();
        waiting.join().unwrap().unwrap();
        drop(listener);
    }
}
