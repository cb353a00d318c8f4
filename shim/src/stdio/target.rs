//! Opens containerd's ends of the streams.
//!
//! As runc's shim does, the shim keeps both ends of an output fifo open. Therefore, a client can disconnect and
//! reconnect. The container does not get SIGPIPE, and no output is lost.
//!
//! Until CloseIO, the shim keeps a write end of the stdin fifo open. Therefore, stdin does not end when a client
//! disconnects.

use std::{
    convert::identity,
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, open as open_fd},
    sys::stat::{Mode, SFlag, fstat},
};

use super::{
    LoggerContext, Paths, Stdio, StdioError,
    logger::{self, LoggerHandle},
};
use crate::blocking;
use crate::host_view::{self, Reached};

/// The source of stdin.
#[derive(Debug)]
pub struct Input {
    /// The fifo's read end, non-blocking.
    pub fifo: OwnedFd,
    /// The fifo's write end, which is open until CloseIO.
    pub write_end: OwnedFd,
}

/// The destination of stdout or stderr.
#[derive(Debug)]
pub enum Output {
    /// A fifo or a logger's pipe, non-blocking.
    Pipe(OwnedFd),
    /// A file, opened for appending.
    File(Arc<File>),
}

/// Opens all streams of a request. Starts the logger if the request names a logger.
pub async fn open(paths: &Paths, context: &LoggerContext<'_>) -> Result<Stdio, StdioError> {
    let stdin = match paths.stdin.as_str() {
        "" => None,
        path => Some(on_host(Path::new(path).to_owned(), "stdin", input).await?),
    };
    let stderr_path = if paths.terminal { "" } else { paths.stderr.as_str() };
    let (stdout, stderr, logger) = match Target::parse(&paths.stdout, "stdout")? {
        // The logger gets stdout and stderr, even if the request names another target for stderr.
        Some(Target::Binary { path, args }) => {
            let (stdout, stderr, handle) = logger::start(&path, &args, context).await?;
            let stderr = (!paths.terminal).then_some(Output::Pipe(stderr));
            (Some(Output::Pipe(stdout)), stderr, Some(handle))
        }
        Some(Target::File(path)) => {
            let stdout = new_file(&path, "stdout").await?;
            let stderr = match Target::parse(stderr_path, "stderr")? {
                _ if paths.terminal => None,
                Some(Target::File(other)) if other != path => Some(new_file(&other, "stderr").await?),
                // As runc's shim does, write both streams to one open file.
                _ => Some(Output::File(Arc::clone(&stdout_file(&stdout, &path)?))),
            };
            (Some(stdout), stderr, None::<LoggerHandle>)
        }
        target => {
            let plain = async |target, stream| match target {
                Some(Target::Path(path)) => on_host(path, stream, output).await.map(Some),
                Some(Target::File(path)) => new_file(&path, stream).await.map(Some),
                Some(Target::Binary { .. }) => {
                    let message = "a logger for stderr alone is not supported; name the logger for stdout instead";
                    Err(StdioError::Uri { stream, uri: paths.stderr.clone(), message })
                }
                None => Ok(None),
            };
            let stdout = plain(target, "stdout").await?;
            let stderr = match (&stdout, Target::parse(stderr_path, "stderr")?) {
                (Some(Output::File(file)), Some(Target::Path(path))) if path == Path::new(&paths.stdout) => {
                    Some(Output::File(Arc::clone(file)))
                }
                (_, target) => plain(target, "stderr").await?,
            };
            (stdout, stderr, None)
        }
    };
    Ok(Stdio { terminal: paths.terminal, stdin, stdout, stderr, logger })
}

fn stdout_file(output: &Output, path: &Path) -> Result<Arc<File>, StdioError> {
    match output {
        Output::File(file) => Ok(Arc::clone(file)),
        Output::Pipe(_) => Err(StdioError::NotFifo { stream: "stdout", path: path.into() }),
    }
}

/// The parsed path or URI of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Path(PathBuf),
    File(PathBuf),
    Binary { path: PathBuf, args: Vec<String> },
}

impl Target {
    fn parse(text: &str, stream: &'static str) -> Result<Option<Self>, StdioError> {
        if text.is_empty() {
            return Ok(None);
        }
        let fail = |message| Err(StdioError::Uri { stream, uri: text.into(), message });
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(Some(Self::Path(text.into()))) };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let Some(path) = decode(path, false) else { return fail("invalid percent encoding") };
        if !path.starts_with('/') {
            return fail("the path is not absolute");
        }
        match scheme {
            "fifo" => Ok(Some(Self::Path(path.into()))),
            "file" => Ok(Some(Self::File(path.into()))),
            "binary" => {
                let mut args = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    let (Some(key), Some(value)) = (decode(key, true), decode(value, true)) else {
                        return fail("invalid percent encoding");
                    };
                    // As containerd does, pass the key and the value as two arguments.
                    args.extend([key, value]);
                }
                Ok(Some(Self::Binary { path: path.into(), args }))
            }
            _ => fail("unsupported scheme: expected fifo://, file:// or binary://"),
        }
    }
}

/// Decodes percent encoding. In a query, also decodes `+` as a space.
fn decode(text: &str, query: bool) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok().filter(|text| !text.contains('\0'))
}

/// Calls `open` on another thread, with the host's file at `path`. The error names `path`.
async fn on_host<T: Send + 'static>(
    path: PathBuf,
    stream: &'static str,
    open: impl FnOnce(Reached) -> Result<T, OpenError> + Send + 'static,
) -> Result<T, StdioError> {
    let of_host = path.clone();
    let opened = blocking::spawn(move || open(host_view::of_process().reach(&of_host)?)).await;
    opened.map_err(OpenError::from).and_then(identity).map_err(|error| match error {
        OpenError::Failed(source) => StdioError::Open { stream, path, source },
        OpenError::NotFifo => StdioError::NotFifo { stream, path },
    })
}

/// Why a stream cannot be opened.
enum OpenError {
    Failed(io::Error),
    NotFifo,
}

impl<E: Into<io::Error>> From<E> for OpenError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn input(reached: Reached) -> Result<Input, OpenError> {
    let path = reached.path.as_path();
    let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    // Open the read end first, because opening the write end fails if the fifo has no reader.
    let fifo = open_fd(path, OFlag::O_RDONLY | flags, Mode::empty())?;
    if !is_fifo(&fifo)? {
        return Err(OpenError::NotFifo);
    }
    let write_end = open_fd(path, OFlag::O_WRONLY | flags, Mode::empty())?;
    Ok(Input { fifo, write_end })
}

fn output(reached: Reached) -> Result<Output, OpenError> {
    // Open the read end and the write end with one fd, because opening only the write end fails if the fifo has no
    // reader.
    let fd = open_fd(&reached.path, OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())?;
    if is_fifo(&fd)? {
        return Ok(Output::Pipe(fd));
    }
    file(reached, false)
}

fn is_fifo(fd: &OwnedFd) -> nix::Result<bool> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO)
}

/// Truncates the file, or creates the file and its parent directories. Opens the file for appending.
async fn new_file(path: &Path, stream: &'static str) -> Result<Output, StdioError> {
    on_host(path.to_owned(), stream, |reached| file(reached, true)).await
}

/// Opens a file for appending. If `truncate` is true, first truncates the file, or creates the file and its parent
/// directories.
fn file(mut reached: Reached, truncate: bool) -> Result<Output, OpenError> {
    let flags = reached.no_follow().bits();
    if truncate {
        reached.create_directories()?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o644).custom_flags(flags).open(&reached.path)?;
    }
    Ok(Output::File(Arc::new(OpenOptions::new().append(true).custom_flags(flags).open(&reached.path)?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Option<Target> {
        Target::parse(text, "stdout").unwrap()
    }

    #[test]
    fn parse_accepts_fifos_files_and_loggers() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("/run/x"), Some(Target::Path("/run/x".into())));
        assert_eq!(parse("fifo:///run/x"), Some(Target::Path("/run/x".into())));
        assert_eq!(parse("file:///a%20b"), Some(Target::File("/a b".into())));
        let args = ["k", "a b", "flag", "", "p", "/x"].map(String::from).to_vec();
        assert_eq!(parse("binary:///bin/l?k=a+b&flag&p=%2fx"), Some(Target::Binary { path: "/bin/l".into(), args }));
        for bad in ["pipe:///x", "binary://relative", "file:///%zz", "file:///%0", "http://x/y"] {
            assert!(matches!(Target::parse(bad, "stdout"), Err(StdioError::Uri { .. })), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parse_never_panics(text: String) {
            let _ = Target::parse(&text, "stdout");
            let _ = Target::parse(&format!("binary:///{text}"), "stdout");
        }
    }
}
