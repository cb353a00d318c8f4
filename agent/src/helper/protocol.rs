//! The protocol between agent and helper: JSON files in a directory that only the agent can access.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use serde::{Deserialize, Serialize};

/// Request to a helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Create a container.
    Create(CreateRequest),
    /// Start an exec in a container.
    Exec(Box<ExecRequest>),
}

/// Request to create a container. The specification is `config.json` in the bundle.
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Directory of `config.json`.
    pub bundle: PathBuf,
    /// Directory of libcontainer's state.
    pub state_root: PathBuf,
    /// Directory of the container's cgroup.
    pub cgroup: PathBuf,
    /// Path of the console socket, which receives the terminal's master. `None` for a process without a terminal.
    pub console: Option<PathBuf>,
}

/// Request to start an exec.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// PID of the container's init in the agent's PID namespace.
    pub init_pid: i32,
    /// Process as the client specified it.
    pub process: Process,
    /// The container's seccomp filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// Directory of the container's cgroup.
    pub cgroup: PathBuf,
    /// Path of the console socket, which receives the terminal's master. `None` for a process without a terminal.
    pub console: Option<PathBuf>,
    /// Number of the inherited fd of a pipe. The helper writes the PID of the new process to this pipe, in native byte
    /// order, as soon as the process exists.
    pub pid_pipe: RawFd,
}

/// Response of a helper.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response {
    /// PID of the new process; 0 on failure.
    pub pid: i32,
    /// Reason why the helper failed, in the wording of runc's errors. `None` on success.
    pub error: Option<String>,
}

impl Request {
    /// Reads a request.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes the request.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }
}

impl Response {
    /// Reads a response.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes the response.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }
}
