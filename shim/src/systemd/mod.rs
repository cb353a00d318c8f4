//! Scopes of systemd's: what a `cgroupsPath` of the form `slice:prefix:name` asks for, as the kubelet's driver "systemd"
//! makes them. systemd is asked as runc asks it (libcontainer/cgroups/systemd), but by the socket that `systemctl` uses.

mod connection;
mod message;

use std::path::Path;
use std::time::Duration;

pub use connection::CallError;
use connection::Connection;
use message::Body;
pub use message::{Property, Value};

/// Where systemd itself listens. There is no bus, and none of its limits, between it and root there.
const SOCKET: &str = "/run/systemd/private";
/// How long a scope may take to come, as with runc.
const START: Duration = Duration::from_secs(30);
/// How long properties may take.
const SET: Duration = Duration::from_secs(10);
/// How long the end may take: containerd waits three seconds for a shim's.
const STOP: Duration = Duration::from_secs(2);

const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A unit's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit(String);

/// A scope to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The slice it is in; systemd makes it if there is none.
    pub slice: String,
    /// Its name, with `.scope`.
    pub unit: Unit,
}

/// Why systemd did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// No scope.
    #[error("starting systemd's {unit} in {slice}")]
    Start {
        /// The scope.
        unit: String,
        /// Its slice.
        slice: String,
        /// Why.
        #[source]
        source: CallError,
    },
    /// Properties are as they were.
    #[error("setting properties of systemd's {unit}")]
    Set {
        /// The scope.
        unit: String,
        /// Why.
        #[source]
        source: CallError,
    },
    /// It may be there still.
    #[error("stopping systemd's {unit}")]
    Stop {
        /// The scope.
        unit: String,
        /// Why.
        #[source]
        source: CallError,
    },
}

impl Scope {
    /// Has systemd make the scope and move the process into it; both are done when this returns. Blocks.
    ///
    /// # Errors
    /// [`UnitError::Start`]; also where there is one of that name that has not failed.
    pub fn start(&self, pid: u32) -> Result<(), UnitError> {
        self.start_at(Path::new(SOCKET), pid)
    }

    fn start_at(&self, socket: &Path, pid: u32) -> Result<(), UnitError> {
        let Self { slice, unit: Unit(unit) } = self;
        let properties = self.properties(pid);
        let start = |connection: &mut Connection| {
            let body = Body::default().text(unit).text("replace").properties(&properties).no_structures();
            connection.job(unit, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        };
        let all = |connection: &mut Connection| match start(connection) {
            // One that failed stays until somebody has taken note, and may be what is left of an earlier sandbox.
            // Made by the call before, if systemd went away over the answer.
            Err(error) if error.is(EXISTS) && is_in(pid, unit) => Ok(()),
            Err(error) if error.is(EXISTS) => {
                reset(connection, unit)?;
                start(connection)
            }
            Err(error @ CallError::Job { .. }) => {
                reset(connection, unit)?;
                Err(error)
            }
            other => other,
        };
        with(socket, START, all).map_err(|source| UnitError::Start { unit: unit.clone(), slice: slice.clone(), source })
    }

    fn properties(&self, pid: u32) -> Vec<Property> {
        vec![
            ("Description", Value::Text(format!("Husk sandbox {}", self.unit.0.trim_end_matches(".scope")))),
            ("Slice", Value::Text(self.slice.clone())),
            ("PIDs", Value::Numbers(vec![pid])),
            ("Delegate", Value::Bool(true)),
            ("MemoryAccounting", Value::Bool(true)),
            ("CPUAccounting", Value::Bool(true)),
            ("IOAccounting", Value::Bool(true)),
            ("TasksAccounting", Value::Bool(true)),
            ("DefaultDependencies", Value::Bool(false)),
            // One whose VMM was killed for its memory is not to stay as a failed unit: who runs it knows already.
            ("CollectMode", Value::Text("inactive-or-failed".into())),
        ]
    }
}

impl Unit {
    /// The unit of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Sets properties until the next boot: systemd writes them now, and whenever it writes those of the same controller
    /// again, as after `systemctl set-property`. Blocks.
    ///
    /// # Errors
    /// [`UnitError::Set`].
    pub fn set(&self, properties: &[Property]) -> Result<(), UnitError> {
        let Self(unit) = self;
        let set = |connection: &mut Connection| {
            let body = Body::default().text(unit).bool(true).properties(properties);
            connection.call("SetUnitProperties", "sba(sv)", body).map(drop)
        };
        with(Path::new(SOCKET), SET, set).map_err(|source| UnitError::Set { unit: unit.clone(), source })
    }

    /// Has systemd end it; one that is not there has ended. Its processes have to be gone, or systemd ends them. Blocks.
    ///
    /// # Errors
    /// [`UnitError::Stop`].
    pub fn stop(&self) -> Result<(), UnitError> {
        self.stop_at(Path::new(SOCKET))
    }

    fn stop_at(&self, socket: &Path) -> Result<(), UnitError> {
        let Self(unit) = self;
        let stop = |connection: &mut Connection| {
            let body = Body::default().text(unit).text("replace");
            match connection.job(unit, "StopUnit", "ss", body) {
                Err(error) if error.is(NO_SUCH) => Ok(()),
                other => other,
            }
        };
        with(socket, STOP, stop).map_err(|source| UnitError::Stop { unit: unit.clone(), source })
    }
}

/// Whether a process is in a unit's cgroup.
fn is_in(pid: u32, unit: &str) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().any(|line| line.rsplit('/').next() == Some(unit))
}

/// Makes systemd forget that a unit failed; one that has not, or is not there, stays so.
fn reset(connection: &mut Connection, unit: &str) -> Result<(), CallError> {
    match connection.call("ResetFailedUnit", "s", Body::default().text(unit)) {
        Err(CallError::Failed { .. }) => Ok(()),
        other => other.map(drop),
    }
}

/// Does something on a connection of its own, which is closed then: a sandbox that runs has none. Once more where systemd
/// went away, as it does when it executes itself anew (`systemctl daemon-reexec`, an upgrade).
fn with<T>(
    socket: &Path,
    patience: Duration,
    mut act: impl FnMut(&mut Connection) -> Result<T, CallError>,
) -> Result<T, CallError> {
    let mut once = || act(&mut Connection::open(socket, patience)?);
    match once() {
        Err(error) if error.is_gone() => once(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::message::tests::{failed, removed, returned};
    use super::*;

    /// Answers each call by what is next; gives the calls' bytes. A connection that is to be answered by nothing is closed.
    fn peer(dir: &Path, connections: Vec<Vec<Vec<Vec<u8>>>>) -> JoinHandle<Vec<Vec<u8>>> {
        let listener = UnixListener::bind(dir.join("socket")).unwrap();
        std::thread::spawn(move || {
            let mut calls = Vec::new();
            for answers in connections {
                let mut stream = BufReader::new(listener.accept().unwrap().0);
                let mut line = Vec::new();
                stream.read_until(b'\n', &mut line).unwrap();
                assert!(line.starts_with(b"\0AUTH EXTERNAL 3"), "{line:?}");
                line.clear();
                stream.read_until(b'\n', &mut line).unwrap();
                assert_eq!(line, b"BEGIN\r\n");
                stream.get_mut().write_all(b"OK 0123\r\n").unwrap();
                for answer in answers {
                    let mut call = vec![0; message::FIXED];
                    stream.read_exact(&mut call).unwrap();
                    let rest = message::rest(call.first_chunk().unwrap()).unwrap();
                    call.resize(message::FIXED + rest, 0);
                    stream.read_exact(&mut call[message::FIXED..]).unwrap();
                    calls.push(call);
                    // In pieces, as a socket may give them.
                    for bytes in answer.concat().chunks(7) {
                        stream.get_mut().write_all(bytes).unwrap();
                    }
                }
            }
            calls
        })
    }

    fn scope() -> Scope {
        Scope { slice: "pods.slice".into(), unit: Unit::new("p-n.scope") }
    }

    fn has(call: &[u8], text: &str) -> bool {
        call.windows(text.len()).any(|part| part == text.as_bytes())
    }

    #[test]
    fn a_scope_is_there_when_its_job_is_done() {
        let dir = tempfile::tempdir().unwrap();
        // The job's end may come before the answer, and other jobs end as well.
        let early = vec![removed("/job/3", "p-n.scope", "done"), returned(1, "/job/3")];
        let late = vec![returned(1, "/job/4"), removed("/job/3", "x", "failed"), removed("/job/4", "p", "done")];
        let calls = peer(dir.path(), vec![vec![early], vec![late]]);
        let socket = dir.path().join("socket");
        scope().start_at(&socket, 77).unwrap();
        scope().unit.stop_at(&socket).unwrap();
        let calls = calls.join().unwrap();
        assert!(has(&calls[0], "StartTransientUnit") && has(&calls[0], "pods.slice") && has(&calls[0], "Delegate"));
        assert!(has(&calls[1], "StopUnit") && has(&calls[1], "p-n.scope"));
    }

    #[test]
    fn what_an_earlier_one_left_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let again = vec![returned(3, "/job/5"), removed("/job/5", "p-n.scope", "done")];
        let none = failed(2, "org.freedesktop.systemd1.NoSuchUnit", "not loaded");
        let calls = peer(dir.path(), vec![vec![vec![failed(1, EXISTS, "exists")], vec![none], again]]);
        scope().start_at(&dir.path().join("socket"), 77).unwrap();
        assert!(has(&calls.join().unwrap()[1], "ResetFailedUnit"));
    }

    #[test]
    fn what_fails_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let job = vec![returned(1, "/job/6"), removed("/job/6", "p-n.scope", "dependency")];
        let exists = || vec![failed(1, EXISTS, "Unit p-n.scope was already loaded")];
        let there = vec![failed(3, EXISTS, "Unit p-n.scope was already loaded")];
        let reset = || vec![returned(2, "")];
        let gone = vec![vec![failed(1, NO_SUCH, "not loaded")]];
        let peer = peer(dir.path(), vec![vec![job, reset()], vec![exists(), reset(), there], vec![], gone]);
        let socket = dir.path().join("socket");
        let error = crate::chain(&scope().start_at(&socket, 7).unwrap_err());
        assert_eq!(error, "starting systemd's p-n.scope in pods.slice: the job of p-n.scope ended as \"dependency\"");
        let error = crate::chain(&scope().start_at(&socket, 7).unwrap_err());
        assert!(error.contains("already loaded (org.freedesktop.systemd1.UnitExists)"), "{error}");
        // systemd executed itself anew, and knows nothing of the unit.
        scope().unit.stop_at(&socket).unwrap();
        assert_eq!(peer.join().unwrap().len(), 6);
        let error = crate::chain(&scope().start_at(&dir.path().join("none"), 7).unwrap_err());
        assert!(error.contains("connecting to") && error.contains("none: No such file"), "{error}");
    }
}
