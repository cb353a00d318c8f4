//! Relays a process's stdin, stdout and stderr between containerd's ends (fifos, files, loggers) and the guest.
//!
//! ```text
//! // Before the shim sends a Create or Exec request to the agent:
//! let stdio = Stdio::open(&paths, &logger).await?;
//! let needed = stdio.needed_streams();
//! // The shim opens the needed streams. Then the shim starts the copying.
//! let relay = stdio.start(streams)?;
//! // On a CloseIO request:
//! relay.close_stdin();
//! // On a Delete request:
//! relay.drain(quiet, total).await;
//! // Dropping the relay stops all copy tasks and closes containerd's ends.
//! drop(relay);
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

/// containerd's ends of a process's streams, as named in a Create or Exec request. `stdin` is a path. `stdout` and
/// `stderr` are paths or URIs (`fifo://`, `file://` or `binary://`). Each of the three strings can be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Stdin.
    pub stdin: String,
    /// Stdout, or the output of the terminal.
    pub stdout: String,
    /// Stderr. Ignored if the process has a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// The container whose output a logger gets.
#[derive(Debug, Clone, Copy)]
pub struct LoggerContext<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The containerd namespace of the container.
    pub namespace: &'a str,
    /// Starts the logger.
    pub launcher: &'a Launcher,
}

/// The streams that a process needs.
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
    /// Separate streams for stdin, stdout and stderr.
    Pipes {
        /// Stdin.
        stdin: Option<UnixStream>,
        /// Stdout.
        stdout: Option<UnixStream>,
        /// Stderr.
        stderr: Option<UnixStream>,
    },
}

/// The opened fifos, files and logger pipes on containerd's side.
#[derive(Debug)]
pub struct Stdio {
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<LoggerHandle>,
}

impl Stdio {
    /// Opens containerd's ends. Starts the logger if `paths.stdout` names a logger.
    pub async fn open(paths: &Paths, context: &LoggerContext<'_>) -> Result<Self, StdioError> {
        target::open(paths, context).await
    }

    /// Returns the streams that the process needs.
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
