//! The standard streams of one process: its fds 0 to 2 and the relays that serve them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use tokio::sync::Notify;

use super::relay::{self, Endpoint};

/// Streams that a request names, taken from the table of connected streams.
#[derive(Default)]
pub struct StdioStreams {
    /// Stream for standard input, or for the terminal's input.
    pub stdin: Option<OwnedFd>,
    /// Stream for standard output, or for the terminal's output.
    pub stdout: Option<OwnedFd>,
    /// Stream for standard error. `None` if the process has a terminal.
    pub stderr: Option<OwnedFd>,
}

/// Fds 0 to 2 of a process that is about to start.
pub struct ChildIo {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Relays between streams and a process. The relays do not run before [`Relays::start`].
#[derive(Default)]
pub struct Relays {
    input: Option<(Endpoint, Endpoint)>,
    outputs: Vec<(Endpoint, Endpoint)>,
    close: Arc<Notify>,
}

impl Relays {
    /// Creates pipes for a process that runs as `uid`. Uses `/dev/null` for each fd that has no stream.
    pub fn pipes(streams: StdioStreams, uid: u32) -> io::Result<(Self, ChildIo)> {
        let mut relays = Self::default();
        let stdin = match streams.stdin {
            None => open_null()?,
            Some(stream) => {
                let (reader, writer) = pipe(uid)?;
                relays.input = Some((relay::endpoint(stream)?, relay::endpoint(writer)?));
                reader
            }
        };
        let mut output = |stream: Option<OwnedFd>| match stream {
            None => open_null(),
            Some(stream) => {
                let (reader, writer) = pipe(uid)?;
                relays.outputs.push((relay::endpoint(reader)?, relay::endpoint(stream)?));
                Ok(writer)
            }
        };
        let (stdout, stderr) = (output(streams.stdout)?, output(streams.stderr)?);
        Ok((relays, ChildIo { stdin, stdout, stderr }))
    }

    /// Creates the relays of a terminal. Either one stream carries both directions, or each direction has its own
    /// stream.
    pub fn terminal(streams: StdioStreams, master: &Endpoint) -> io::Result<Self> {
        let mut relays = Self::default();
        let stdout = streams.stdout.map(relay::endpoint).transpose()?;
        let stdin = match streams.stdin {
            Some(stream) => Some(relay::endpoint(stream)?),
            None => stdout.clone(),
        };
        if let Some(stream) = &stdin {
            relays.input = Some((stream.clone(), master.clone()));
        }
        if let Some(stream) = stdout.or(stdin) {
            relays.outputs.push((master.clone(), stream));
        }
        Ok(relays)
    }

    /// Starts the relays. Notifying the returned value closes standard input.
    pub fn start(self) -> Arc<Notify> {
        if let Some((stream, process)) = self.input {
            tokio::spawn(relay::input(stream, process, self.close.clone()));
        }
        for (process, stream) in self.outputs {
            tokio::spawn(relay::output(process, stream));
        }
        self.close
    }
}

/// Opens `/dev/null` three times, for a process that replaces fds 0 to 2 with a terminal.
pub fn null_stdio() -> io::Result<ChildIo> {
    Ok(ChildIo { stdin: open_null()?, stdout: open_null()?, stderr: open_null()? })
}

fn open_null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

/// Creates a pipe owned by `uid`, so that the process can open it again through `/dev/stdout`.
fn pipe(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let (reader, writer): (File, OwnedFd) = (File::from(OwnedFd::from(reader)), writer.into());
    // If the call fails, the pipe keeps the default size.
    let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(relay::PIPE_BYTES));
    std::os::unix::fs::fchown(&reader, Some(uid), None)?;
    Ok((reader.into(), writer))
}
