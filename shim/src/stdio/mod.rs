//! Relays a process's stdin, stdout and stderr between containerd's ends (fifos, files, loggers) and the guest.
//!
//! ```text
//! let stdio = Stdio::open(&paths, &logger).await?; // before the request goes to the guest
//! let needed = stdio.needed_streams();             // open these vsock streams; a terminal needs one stream
//! let relay = stdio.start(streams)?;               // copies until the streams end
//! relay.close_stdin();                             // CloseIO
//! relay.drain(quiet).await;                        // before Delete
//! drop(relay);                                     // stops the remaining copies, closes containerd's ends
//! ```

mod copy;
mod error;
mod logger;
mod relay;
mod target;
#[cfg(test)]
mod tests;

pub use error::StdioError;
pub use relay::Relay;

use tokio::net::UnixStream;

use crate::launcher::Launcher;
use logger::LoggerHandle;
use target::{Input, Output};

/// The targets of a process's streams in a Create or Exec request. Stdin's target is a path. An output's target is a
/// path or a URI (`fifo://`, `file://` or `binary://`). Each target can be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Stdin.
    pub stdin: String,
    /// Stdout, or the output of the terminal.
    pub stdout: String,
    /// Stderr. Ignored for a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// The container whose output a logger gets.
#[derive(Debug, Clone, Copy)]
pub struct LoggerContext<'a> {
    /// The container's id.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Starts the logger.
    pub launcher: &'a Launcher,
}

/// The streams to the guest that a process needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeededStreams {
    /// A stream for stdin.
    pub stdin: bool,
    /// A stream for stdout.
    pub stdout: bool,
    /// A stream for stderr.
    pub stderr: bool,
    /// One bidirectional stream for a terminal, instead of separate streams.
    pub terminal: bool,
}

/// The streams to the guest.
#[derive(Debug)]
pub enum Streams {
    /// The bidirectional stream of a terminal.
    Terminal(UnixStream),
    /// A stream for each standard stream.
    Pipes {
        /// Stdin.
        stdin: Option<UnixStream>,
        /// Stdout.
        stdout: Option<UnixStream>,
        /// Stderr.
        stderr: Option<UnixStream>,
    },
}

/// The opened ends of the streams on containerd's side.
#[derive(Debug)]
pub struct Stdio {
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<LoggerHandle>,
}

impl Stdio {
    /// Opens containerd's ends. Starts the logger if a target in `paths` is a logger.
    pub async fn open(paths: &Paths, context: &LoggerContext<'_>) -> Result<Self, StdioError> {
        target::open(paths, context).await
    }

    /// Returns the streams to the guest that the process needs.
    pub fn needed_streams(&self) -> NeededStreams {
        NeededStreams {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            terminal: self.terminal,
        }
    }

    /// Starts copying between containerd's ends and the streams to the guest. Must be called in an async runtime.
    ///
    /// # Errors
    /// [`StdioError::Register`] if an fd cannot be registered with the runtime.
    pub fn start(self, streams: Streams) -> Result<Relay, StdioError> {
        Relay::start(self, streams)
    }
}
