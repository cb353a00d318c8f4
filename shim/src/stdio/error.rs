//! Errors from opening a process's streams.

use std::{io, path::PathBuf};

/// A failure to open a stream.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The file or fifo cannot be opened.
    #[error("failed to open {} for {stream}", path.display())]
    Open {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not a fifo, but the stream needs a fifo.
    #[error("failed to open {} for {stream}: the file is not a fifo", path.display())]
    NotFifo {
        /// `stdin` or `stdout`.
        stream: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The URI is malformed, or its scheme is not supported.
    #[error("invalid URI {uri:?} for {stream}: {message}")]
    Uri {
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// The URI.
        uri: String,
        /// What is wrong with the URI.
        message: &'static str,
    },
    /// The logger did not start.
    #[error("failed to start the logger {}: {message}", path.display())]
    Logger {
        /// The program.
        path: PathBuf,
        /// The operation that failed, or the reason why the start failed.
        message: String,
        /// The cause.
        #[source]
        source: Option<io::Error>,
    },
    /// An fd cannot be registered with the async runtime.
    #[error("failed to register a stream with the async runtime")]
    Register(#[source] io::Error),
}
