//! A process' standard streams: containerd's ends (fifos, files, loggers) and their relay to the guest.
//!
//! ```text
//! let stdio = Stdio::open(&paths, &owner).await?;   // before the request is passed on
//! let wants = stdio.wants();                        // one vsock stream for each; a terminal has one for everything
//! let relay = stdio.start(streams)?;                // copies until the streams end
//! relay.close_stdin();                              // CloseIO
//! relay.drain(quiet).await;                         // before Delete
//! drop(relay);                                      // stops what still runs, closes containerd's ends
//! ```

mod copy;
mod logger;
mod relay;
mod target;
#[cfg(test)]
mod tests;

pub use relay::Relay;
pub use target::StdioError;

use logger::Minder;
use target::{Input, Output};
use tokio::net::UnixStream;

/// The streams as a create or exec request names them: paths of fifos, `file://` and `binary://` URIs, or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Standard input.
    pub stdin: String,
    /// Standard output; a terminal's, both ways.
    pub stdout: String,
    /// Standard error; nothing for a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// What a logger is told about the container.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The container.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
}

/// Which streams to the guest there should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    /// A stream for input.
    pub stdin: bool,
    /// A stream for output.
    pub stdout: bool,
    /// A stream for error output.
    pub stderr: bool,
    /// Instead of the three, one stream both ways.
    pub terminal: bool,
}

/// The streams to the guest.
#[derive(Debug)]
pub enum Streams {
    /// A terminal's.
    Terminal(UnixStream),
    /// One per standard stream.
    Pipes {
        /// For input.
        stdin: Option<UnixStream>,
        /// For output.
        stdout: Option<UnixStream>,
        /// For error output.
        stderr: Option<UnixStream>,
    },
}

/// containerd's ends of the streams, opened.
#[derive(Debug)]
pub struct Stdio {
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Minder>,
}

impl Stdio {
    /// Opens containerd's ends and starts the logger, if there is one.
    ///
    /// # Errors
    /// [`StdioError`] says which cannot be opened, and why.
    pub async fn open(paths: &Paths, owner: &Owner<'_>) -> Result<Self, StdioError> {
        target::open(paths, owner).await
    }

    /// Which streams to the guest there should be.
    pub fn wants(&self) -> Wants {
        Wants {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            terminal: self.terminal,
        }
    }

    /// Copies between containerd's ends and the guest's until they end; needs a running runtime.
    ///
    /// # Errors
    /// [`StdioError::Register`] when the runtime takes no more descriptors.
    pub fn start(self, streams: Streams) -> Result<Relay, StdioError> {
        Relay::start(self, streams)
    }
}
