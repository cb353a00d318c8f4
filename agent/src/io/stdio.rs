//! The standard streams of one process: what it gets as descriptors 0 to 2 and the relays behind them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::sync::Notify;

use super::relay::{self, End};

/// The streams a request named.
#[derive(Default)]
pub struct Dialled {
    /// Bytes for standard input, or for the terminal.
    pub stdin: Option<OwnedFd>,
    /// Standard output, or the terminal's.
    pub stdout: Option<OwnedFd>,
    /// Standard error; never with a terminal.
    pub stderr: Option<OwnedFd>,
}

/// Descriptors 0 to 2 of a process about to be started.
pub struct ChildIo {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// The agent's side, not yet moving bytes.
#[derive(Default)]
pub struct Relays {
    input: Option<(End, End)>,
    outputs: Vec<(End, End)>,
    close: Arc<Notify>,
}

impl Relays {
    /// Pipes for a process that runs as `uid`, or `/dev/null` where no stream was named.
    ///
    /// # Errors
    /// When a pipe or `/dev/null` cannot be opened.
    pub fn pipes(dialled: Dialled, uid: u32) -> io::Result<(Self, ChildIo)> {
        let mut relays = Self::default();
        let stdin = match dialled.stdin {
            None => null()?,
            Some(stream) => {
                let (reader, writer) = pipe(uid)?;
                relays.input = Some((relay::end(stream)?, relay::end(writer)?));
                reader
            }
        };
        let mut output = |stream: Option<OwnedFd>| match stream {
            None => null(),
            Some(stream) => {
                let (reader, writer) = pipe(uid)?;
                relays.outputs.push((relay::end(reader)?, relay::end(stream)?));
                Ok(writer)
            }
        };
        let (stdout, stderr) = (output(dialled.stdout)?, output(dialled.stderr)?);
        Ok((relays, ChildIo { stdin, stdout, stderr }))
    }

    /// A terminal: one stream carries both directions, or two carry one each.
    ///
    /// # Errors
    /// When a descriptor cannot be registered with the executor.
    pub fn terminal(dialled: Dialled, master: &End) -> io::Result<Self> {
        let mut relays = Self::default();
        let stdout = dialled.stdout.map(relay::end).transpose()?;
        let stdin = match dialled.stdin {
            Some(stream) => Some(relay::end(stream)?),
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

    /// Starts moving bytes; what is returned closes standard input when notified.
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

/// Descriptors for a process whose streams come from elsewhere, a terminal.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn nulls() -> io::Result<ChildIo> {
    Ok(ChildIo { stdin: null()?, stdout: null()?, stderr: null()? })
}

fn null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

/// A pipe whose both ends the user can open again, as programs do with `/dev/stdout`.
fn pipe(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let (reader, writer): (File, OwnedFd) = (File::from(OwnedFd::from(reader)), writer.into());
    // SAFETY: fcntl with F_SETPIPE_SZ takes no pointers; the descriptor is alive. A refusal leaves the default size.
    unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, relay::PIPE_BYTES) };
    std::os::unix::fs::fchown(&reader, Some(uid), None)?;
    Ok((reader.into(), writer))
}
