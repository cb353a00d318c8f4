//! Messages between the shim and the launcher.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use husk_base::sys::scm_rights;
use serde::{Deserialize, Serialize};

use super::{ProgramOptions, StartCgroup};

/// Maximum size of an answer in bytes.
const MAX_REPLY: usize = 4096;

/// The cgroup of a program.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Cgroup {
    /// The cgroup of the launcher.
    Launcher,
    /// Cgroup v2. The last fd of the packet is its directory.
    V2,
    /// Cgroup v1. The last fds of the packet, of this number, are the files `cgroup.procs`.
    V1(usize),
}

/// A request to the launcher. The packet carries fds: first a file that contains the request as JSON, then the socket
/// for the answers. The request determines which further fds the packet carries.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Execute a program. The further fds become the program's fds 0, 1, 2 and so on, except those of the cgroup.
    Program {
        /// Bytes of the path.
        path: Vec<u8>,
        /// `argv[0]`, if it is not the path.
        arg0: Option<String>,
        /// The arguments after `argv[0]`.
        args: Vec<String>,
        /// The environment. `None` means the launcher's environment.
        env: Option<Vec<(String, String)>>,
        /// Bytes of the working directory's path. `None` means the launcher's directory.
        cwd: Option<Vec<u8>>,
        /// The cgroup in which the program starts.
        cgroup: Cgroup,
    },
    /// Start the VMM process. The further fds are the mount namespace, the network namespace, and the files
    /// `cgroup.procs` of the cgroups.
    Vmm,
}

impl From<&ProgramOptions<'_>> for Request {
    fn from(options: &ProgramOptions<'_>) -> Self {
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self::Program {
            path: options.path.as_os_str().as_bytes().to_owned(),
            arg0: options.arg0.map(ToOwned::to_owned),
            args: options.args.to_owned(),
            env: options.env.as_ref().map(|env| env.iter().map(pair).collect()),
            cwd: options.cwd.map(|path| path.as_os_str().as_bytes().to_owned()),
            cgroup: match options.cgroup {
                None => Cgroup::Launcher,
                Some(StartCgroup::V2(_)) => Cgroup::V2,
                Some(StartCgroup::V1(procs)) => Cgroup::V1(procs.len()),
            },
        }
    }
}

/// An answer.
#[derive(Debug)]
pub enum Reply {
    /// The process exists.
    Started {
        /// The process's PID.
        pid: i32,
        /// The process's pidfd, and the control socket if the process is the VMM.
        fds: Vec<OwnedFd>,
    },
    /// The program cannot be executed.
    Failed(io::Error),
    /// The VMM cannot be started. The text contains the causes.
    Error(String),
}

/// A [`Reply`] without its fds.
#[derive(Debug, Serialize, Deserialize)]
enum Encoded {
    Started(i32),
    Failed(i32),
    Error(String),
}

impl Reply {
    /// Receives an answer. Returns `None` if all copies of the socket's other end are closed.
    ///
    /// # Errors
    /// The errors of recvmsg(2), or [`io::ErrorKind::InvalidData`] if the answer is malformed.
    pub fn receive(socket: &OwnedFd) -> io::Result<Option<Self>> {
        let mut bytes = [0; MAX_REPLY];
        let packet = scm_rights::receive(socket, &mut bytes)?;
        if packet.len == 0 {
            return Ok(None);
        }
        let encoded = serde_json::from_slice(bytes.get(..packet.len).unwrap_or_default());
        Ok(Some(match encoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
            Encoded::Started(pid) => Self::Started { pid, fds: packet.fds },
            Encoded::Failed(errno) => Self::Failed(io::Error::from_raw_os_error(errno)),
            Encoded::Error(text) => Self::Error(text),
        }))
    }

    /// Sends the answer that a process exists.
    pub fn send_started(socket: impl AsFd, pid: i32, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(socket, &Encoded::Started(pid), fds)
    }

    /// Sends the answer that the program cannot be executed.
    pub fn send_failed(socket: impl AsFd, error: &io::Error) -> io::Result<()> {
        send(socket, &Encoded::Failed(error.raw_os_error().unwrap_or(libc::EINVAL)), &[])
    }

    /// Sends the answer that the VMM cannot be started.
    pub fn send_error(socket: impl AsFd, text: &str) -> io::Result<()> {
        // The packet must not exceed MAX_REPLY, and JSON may need six bytes for a character.
        send(socket, &Encoded::Error(text.chars().take(MAX_REPLY / 8).collect()), &[])
    }
}

fn send(socket: impl AsFd, encoded: &Encoded, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    scm_rights::send(socket, &serde_json::to_vec(encoded)?, fds).map(drop)
}
