//! One process of a container: its phase, its streams, its end.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libcontainer::oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::{Notify, watch};

use super::error::Fault;
use super::kill::Mark;
use crate::io::console;
use crate::io::relay::Endpoint;
use crate::io::stdio::StdioStreams;
use crate::reaper::ProcessExit;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It has no process id yet.
    New,
    /// A container's first process waits for its start.
    Created(i32),
    /// Its start is under way.
    Starting,
    /// It runs.
    Running(i32),
    /// It has ended.
    Stopped(i32, ProcessExit),
}

impl Phase {
    /// The process id, 0 if there is none yet.
    pub fn pid(self) -> i32 {
        match self {
            Self::New | Self::Starting => 0,
            Self::Created(pid) | Self::Running(pid) | Self::Stopped(pid, _) => pid,
        }
    }
}

/// What the request that made a process said of its streams.
#[derive(Debug, Clone, Default)]
pub struct StreamNames {
    /// It has a terminal.
    pub terminal: bool,
    /// Token of standard input.
    pub stdin: String,
    /// Token of standard output.
    pub stdout: String,
    /// Token of standard error.
    pub stderr: String,
}

#[derive(Default)]
struct Io {
    close: Option<Arc<Notify>>,
    master: Option<Endpoint>,
}

/// A process; the first one of a container has an empty exec id.
pub struct Process {
    /// Its name in its container.
    pub exec_id: String,
    /// Its streams' names.
    pub names: StreamNames,
    phase: watch::Sender<Phase>,
    io: Mutex<Io>,
    /// By which one that Exec made is told from the container's other processes, with all that it starts.
    pub mark: OnceLock<Mark>,
    /// What a later start needs, of a process made by Exec.
    pub pending: Mutex<Option<(ProcessSpec, StdioStreams)>>,
}

impl Process {
    /// A process that has not been started.
    pub fn new(exec_id: &str, names: StreamNames, pending: Option<(ProcessSpec, StdioStreams)>) -> Arc<Self> {
        Arc::new(Self {
            exec_id: exec_id.to_owned(),
            names,
            phase: watch::Sender::new(Phase::New),
            io: Mutex::default(),
            mark: OnceLock::new(),
            pending: Mutex::new(pending),
        })
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Takes the next step, unless it has already ended.
    pub fn advance(&self, next: Phase) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Stopped(..) => false,
            _ => {
                *phase = next;
                true
            }
        });
    }

    /// Waits until it has been made, or will never be.
    pub async fn settled(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::New).await;
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Option<(i32, ProcessExit)> {
        let mut phase = self.phase.subscribe();
        let stopped = phase.wait_for(|phase| matches!(phase, Phase::Stopped(..))).await.ok()?;
        match *stopped {
            Phase::Stopped(pid, ended) => Some((pid, ended)),
            _ => None,
        }
    }

    /// Remembers the means to close its input and to size its terminal.
    pub fn attach(&self, close: Arc<Notify>, master: Option<Endpoint>) {
        let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        *io = Io { close: Some(close), master };
    }

    /// Ends its standard input once what has arrived is written.
    pub fn close_stdin(&self) {
        if let Some(close) = &self.io.lock().unwrap_or_else(PoisonError::into_inner).close {
            close.notify_one();
        }
    }

    /// Sizes its terminal.
    ///
    /// # Errors
    /// [`Fault`] when it has none or the kernel refuses.
    pub fn resize(&self, width: u32, height: u32) -> Result<(), Fault> {
        let master = self.io.lock().unwrap_or_else(PoisonError::into_inner).master.clone();
        match master {
            Some(master) => console::resize(&master, width, height).map_err(super::error::unknown("resize")),
            // runc's shim ignores a resize of what has no terminal.
            None => Ok(()),
        }
    }

    /// Lets go of its terminal.
    pub fn detach(&self) {
        *self.io.lock().unwrap_or_else(PoisonError::into_inner) = Io::default();
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`Fault`] when there is no such process any more, or not yet.
    pub fn signal(&self, signal: i32) -> Result<(), Fault> {
        match self.phase() {
            Phase::Created(pid) | Phase::Running(pid) => {
                // The process is ours and not reaped: its id cannot have been given to another.
                // SAFETY: kill takes no pointers.
                match unsafe { libc::kill(pid, signal) } {
                    0 => Ok(()),
                    _ => match std::io::Error::last_os_error() {
                        error if error.raw_os_error() == Some(libc::ESRCH) => {
                            Err(Fault::NotFound("process already finished".into()))
                        }
                        error if error.raw_os_error() == Some(libc::EINVAL) => {
                            Err(Fault::InvalidArgument(format!("signal {signal}")))
                        }
                        error => Err(Fault::Unknown(format!("kill: {error}"))),
                    },
                }
            }
            Phase::Stopped(..) => Err(Fault::NotFound("process already finished".into())),
            Phase::New | Phase::Starting => Err(Fault::FailedPrecondition("process not created".into())),
        }
    }
}
