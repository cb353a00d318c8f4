//! One process of a container: phase, streams and exit.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};

use husk_base::sync::lock;
use husk_base::sys::pidfd;
use libcontainer::oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::{Notify, watch};

use super::time_namespace::TimeNamespace;
use crate::error::{ServiceError, failed};
use crate::io::console;
use crate::io::relay::Endpoint;
use crate::io::stdio::StdioStreams;
use crate::reaper::ProcessExit;

/// Phase in the life of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The process has no PID yet.
    New,
    /// The container's init waits for Start.
    Created(i32),
    /// Start is in progress. The new process can already exist, and can hang before it executes its program.
    Starting,
    /// The process runs.
    Running(i32),
    /// The container's init has exited and is reaped, so that another process can get its PID. The agent still kills
    /// the container's other processes.
    Exiting(i32),
    /// The process has exited.
    Stopped(i32, ProcessExit),
}

impl Phase {
    /// Returns the PID, or 0 if the process has no PID yet.
    pub fn pid(self) -> i32 {
        match self {
            Self::New | Self::Starting => 0,
            Self::Created(pid) | Self::Running(pid) | Self::Exiting(pid) | Self::Stopped(pid, _) => pid,
        }
    }
}

/// Stream tokens of a process, as given in the Create or Exec request.
#[derive(Debug, Clone, Default)]
pub struct StreamTokens {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Stream token of standard input.
    pub stdin: String,
    /// Stream token of standard output.
    pub stdout: String,
    /// Stream token of standard error.
    pub stderr: String,
}

/// What is known about an exec that is being started.
#[derive(Default)]
struct Start {
    /// Whether a client has killed the exec.
    killed: bool,
    /// The new process, once the helper has created it.
    child: Option<OwnedFd>,
}

impl Start {
    /// Kills the new process if it exists and a client has killed the exec.
    fn enforce(&self) {
        if self.killed
            && let Some(child) = &self.child
        {
            let _ = pidfd::send_signal(child.as_fd(), libc::SIGKILL);
        }
    }
}

#[derive(Default)]
struct Io {
    close: Option<Arc<Notify>>,
    master: Option<Endpoint>,
}

/// A process of a container: its init or an exec.
pub struct Process {
    /// Exec id; empty for the container's init.
    pub exec_id: String,
    /// Stream tokens of the process.
    pub tokens: StreamTokens,
    phase: watch::Sender<Phase>,
    start: Mutex<Start>,
    io: Mutex<Io>,
    /// Time namespace of an exec. All descendants of the exec are in this namespace.
    pub time_namespace: OnceLock<TimeNamespace>,
    /// Specification and streams of an exec that has not been started.
    pub pending: Mutex<Option<(ProcessSpec, StdioStreams)>>,
}

impl Process {
    /// Creates a process that has not been started.
    pub fn new(exec_id: &str, tokens: StreamTokens, pending: Option<(ProcessSpec, StdioStreams)>) -> Arc<Self> {
        Arc::new(Self {
            exec_id: exec_id.to_owned(),
            tokens,
            phase: watch::Sender::new(Phase::New),
            start: Mutex::default(),
            io: Mutex::default(),
            time_namespace: OnceLock::new(),
            pending: Mutex::new(pending),
        })
    }

    /// Returns the current phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Sets the phase, unless the process has already exited.
    pub fn advance(&self, next: Phase) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Stopped(..) => false,
            Phase::Exiting(_) if !matches!(next, Phase::Stopped(..)) => false,
            _ => {
                *phase = next;
                true
            }
        });
    }

    /// Kills an exec that is being started. Its process is killed now, or as soon as the helper has created it.
    pub fn kill_start(&self) {
        let mut start = lock(&self.start);
        start.killed = true;
        start.enforce();
    }

    /// Stores the process that the helper has created for an exec. The process is killed if a client has already killed
    /// the exec.
    pub fn set_child(&self, child: OwnedFd) {
        let mut start = lock(&self.start);
        start.child = Some(child);
        start.enforce();
    }

    /// Ends the start of an exec. Returns whether a client has killed the exec meanwhile, and the process that the
    /// helper has created.
    pub fn end_start(&self) -> (bool, Option<OwnedFd>) {
        let mut start = lock(&self.start);
        (start.killed, start.child.take())
    }

    /// Whether a client has killed the exec while it was being started.
    pub fn is_start_killed(&self) -> bool {
        lock(&self.start).killed
    }

    /// Waits until the process has been created, or its creation has failed.
    pub async fn wait_created(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::New).await;
    }

    /// Waits for the exit of the process. Returns the PID and the exit.
    pub async fn wait(&self) -> Option<(i32, ProcessExit)> {
        let mut phase = self.phase.subscribe();
        let stopped = phase.wait_for(|phase| matches!(phase, Phase::Stopped(..))).await.ok()?;
        match *stopped {
            Phase::Stopped(pid, ended) => Some((pid, ended)),
            _ => None,
        }
    }

    /// Stores the notification that closes standard input, and the terminal's master.
    pub fn attach_io(&self, close: Arc<Notify>, master: Option<Endpoint>) {
        let mut io = lock(&self.io);
        *io = Io { close: Some(close), master };
    }

    /// Closes standard input after the agent has written all data that has already arrived.
    pub fn close_stdin(&self) {
        if let Some(close) = &lock(&self.io).close {
            close.notify_one();
        }
    }

    /// Sets the window size of the terminal.
    pub fn resize(&self, width: u32, height: u32) -> Result<(), ServiceError> {
        let master = lock(&self.io).master.clone();
        match master {
            Some(master) => console::resize(&master, width, height).map_err(failed("resize the terminal")),
            // As with runc's shim, resizing a process without a terminal succeeds.
            None => Ok(()),
        }
    }

    /// Releases the terminal's master.
    pub fn detach_io(&self) {
        *lock(&self.io) = Io::default();
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: i32) -> Result<(), ServiceError> {
        match self.phase() {
            Phase::Created(pid) | Phase::Running(pid) => {
                // The process is a child of the agent and has not been reaped, so its PID cannot have been reused.
                husk_base::sys::process::kill(pid, signal).map_err(|error| match error.raw_os_error() {
                    Some(libc::ESRCH) => ServiceError::NotFound("process already finished".into()),
                    Some(libc::EINVAL) => ServiceError::InvalidArgument(format!("invalid signal {signal}")),
                    _ => failed(format!("send signal {signal}"))(error),
                })
            }
            Phase::Exiting(_) | Phase::Stopped(..) => Err(ServiceError::NotFound("process already finished".into())),
            Phase::New | Phase::Starting => Err(ServiceError::FailedPrecondition("process not created".into())),
        }
    }
}
