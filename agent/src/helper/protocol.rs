//! What agent and helper tell each other: JSON files in a directory only the agent can reach.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use serde::{Deserialize, Serialize};

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Create a container.
    Create(CreateRequest),
    /// Start a further process in one.
    Exec(Box<ExecRequest>),
}

/// The specification is `config.json` in the bundle.
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The container.
    pub id: String,
    /// Directory of `config.json`.
    pub bundle: PathBuf,
    /// Directory of libcontainer's state.
    pub state_root: PathBuf,
    /// Directory of the container's control group.
    pub cgroup: PathBuf,
    /// Where the terminal's master goes, if there is to be one.
    pub console: Option<PathBuf>,
}

/// A process to start beside a container's first.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The container's first process.
    pub init: i32,
    /// The process.
    pub process: Process,
    /// The container's filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// Directory of the container's control group.
    pub cgroup: PathBuf,
    /// Where the terminal's master goes, if there is to be one.
    pub console: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response {
    /// The new process.
    pub pid: i32,
    /// Why there is none.
    pub error: Option<String>,
}

impl Request {
    /// Reads a request.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }
}

impl Response {
    /// Reads an answer.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }
}
