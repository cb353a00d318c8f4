//! A connection to the service manager: a Unix socket, on which D-Bus is spoken, for a few calls one after another. Every
//! one of them blocks, within the time that the connection was given: not for the thread of an async runtime.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::message::{self, Body, Call, FIXED, Malformed, Reader, Received};

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// What the answer to the authentication may have.
const LINE: usize = 256;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens.
    #[error("connecting to {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not let this process in.
    #[error("the service manager refuses this process: {0}")]
    Refused(String),
    /// The connection broke, or took too long.
    #[error("talking with the service manager")]
    Io(#[from] io::Error),
    /// It said something that cannot be understood.
    #[error("the service manager's answer")]
    Malformed(#[from] Malformed),
    /// The method failed.
    #[error("{text} ({name})")]
    Failed {
        /// The error's name.
        name: String,
        /// What the service manager says.
        text: String,
    },
    /// A job ended otherwise.
    #[error("the job of {unit} ended as {result:?}")]
    Job {
        /// The unit.
        unit: String,
        /// How it ended (`canceled`, `timeout`, `failed`, `dependency`, …).
        result: String,
    },
}

impl CallError {
    /// Whether it is the error with this name.
    pub fn is(&self, error: &str) -> bool {
        matches!(self, Self::Failed { name, .. } if name == error)
    }

    /// Whether the other side went away, as it does for a moment when the service manager executes itself anew.
    pub fn is_gone(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        matches!(self, Self::Io(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
    }
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    deadline: Instant,
    serial: u32,
    /// Jobs that ended before anybody asked, with their results.
    ended: Vec<(String, String)>,
}

impl Connection {
    /// Connects, as the user this process is; all that is done with it has to be done within `patience`.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn open(path: &Path, patience: Duration) -> Result<Self, CallError> {
        let deadline = Instant::now() + patience;
        let stream = connect(path, deadline)
            .map_err(|source| CallError::Connect { path: path.display().to_string(), source })?;
        let mut connection = Self { stream, deadline, serial: 0, ended: Vec::new() };
        connection.authenticate()?;
        Ok(connection)
    }

    /// By the socket's own credentials ("Authentication Protocol", EXTERNAL). All in one go, as libsystemd itself does:
    /// where `BEGIN` comes later, and systemd reads it together with the first message, it looks at the message only when
    /// something else comes (libsystemd/sd-bus/bus-socket.c).
    fn authenticate(&mut self) -> Result<(), CallError> {
        let user = nix::unistd::geteuid().to_string();
        let hex: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
        self.write(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())?;
        let mut line = Vec::new();
        // Not a byte more: what comes then are messages.
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.read(&mut byte)?;
            line.extend(byte);
            if line.len() > LINE {
                return Err(Malformed.into());
            }
        }
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("OK ") { Ok(()) } else { Err(CallError::Refused(line.trim_end().to_owned())) }
    }

    /// Calls a method of the manager's and waits for its return; gives its results.
    ///
    /// # Errors
    /// [`CallError`].
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
                other => self.note(other)?,
            }
        }
    }

    /// Calls a method that makes a job, and waits for the job's end.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn job(&mut self, unit: &str, member: &str, signature: &str, body: Body) -> Result<(), CallError> {
        let body = self.call(member, signature, body)?;
        let job = Reader::new(&body).text()?.to_owned();
        loop {
            if let Some((_, result)) = self.ended.iter().find(|(ended, _)| *ended == job) {
                let (unit, result) = (unit.to_owned(), result.clone());
                return if result == "done" { Ok(()) } else { Err(CallError::Job { unit, result }) };
            }
            let received = self.receive()?;
            self.note(received)?;
        }
    }

    /// Keeps what a signal tells of jobs.
    fn note(&mut self, received: Received) -> Result<(), CallError> {
        if let Received::Signal { member, body } = received
            && member == "JobRemoved"
        {
            let mut reader = Reader::new(&body);
            let (_id, job, _unit, result) = (reader.u32()?, reader.text()?, reader.text()?, reader.text()?);
            self.ended.push((job.to_owned(), result.to_owned()));
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Received, CallError> {
        let mut message = vec![0; FIXED];
        self.read(&mut message)?;
        let fixed: &[u8; FIXED] = message.first_chunk().ok_or(Malformed)?;
        let rest = message::rest(fixed)?;
        message.resize(FIXED + rest, 0);
        self.read(message.get_mut(FIXED..).unwrap_or_default())?;
        Ok(message::decode(&message)?)
    }

    fn read(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => buffer = buffer.get_mut(length..).unwrap_or_default(),
                Err(error) => again(error)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.left()?))?;
            // std sends with MSG_NOSIGNAL.
            match self.stream.write(bytes) {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) => again(error)?,
            }
        }
        Ok(())
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

/// Connects. While systemd executes itself anew nobody listens at its socket; it touches the new one when it does, for
/// those who wait by inotify (src/core/dbus.c, bus_init_private).
fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let refused = |result: &io::Result<_>| {
        result.as_ref().is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    let first = UnixStream::connect(path);
    if !refused(&first) {
        return first;
    }
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    inotify.add_watch(dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ATTRIB)?;
    loop {
        let next = UnixStream::connect(path);
        let gone = next.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let left = deadline.saturating_duration_since(Instant::now());
        if !(gone || refused(&next)) || left.is_zero() {
            return next;
        }
        let mut wanted = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wanted, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match inotify.read_events() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether to go on after an error; a socket's time that is over is `EAGAIN`.
fn again(error: io::Error) -> io::Result<()> {
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
    fn who_listens_anew_is_waited_for() {
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
        // A change of its attributes, as touch(1) makes one.
        nix::unistd::chown(&path, Some(nix::unistd::geteuid()), None).unwrap();
        waiting.join().unwrap().unwrap();
        drop(listener);
    }
}
