//! Starts, changes and stops systemd scopes. A `cgroupsPath` of the form `slice:prefix:name` requests a scope. For
//! example, a pod's `cgroupsPath` has this form if the kubelet's cgroup driver is "systemd".
//!
//! The shim sends the same requests as runc (libcontainer/cgroups/systemd). Like systemctl, the shim sends them through
//! systemd's private socket.

mod connection;
mod message;

use std::path::Path;
use std::time::Duration;

use connection::Connection;
use message::Body;

pub use connection::CallError;
pub use message::{Property, Value};

/// Private items that the fuzz targets use.
#[cfg(feature = "testing")]
pub mod testing {
    pub use super::connection::Connection;
    pub use super::message::Body;
}

/// systemd's private socket. Only root can use this socket. Unlike the system bus, the socket needs no D-Bus daemon.
const SOCKET: &str = "/run/systemd/private";
/// Timeout for starting a scope, as in runc.
const START_TIMEOUT: Duration = Duration::from_secs(30);
const SET_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for stopping a scope, shorter than the three seconds for which containerd waits for a shim to exit.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Units that a node's shutdown stops after the scope, because the pod's end needs them. A unit that does not exist has
/// no effect.
///
/// `remote-fs-pre.target` comes after services that the node needs for its remote disks, such as iSCSI.
/// `remote-fs.target` is not here, because a remote file system that hangs at boot would delay all pods.
const STOPPED_LATER: [&str; 5] =
    ["containerd.service", "crio.service", "network.target", "local-fs.target", "remote-fs-pre.target"];
/// Time in microseconds between SIGTERM to the scope's processes and SIGKILL. This is systemd's default, which a node
/// can lower. The shim needs less time.
const SCOPE_STOP_LIMIT_US: u64 = 90_000_000;

const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A unit's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit(String);

/// A scope to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The scope's slice. systemd creates the slice if it does not exist.
    pub slice: String,
    /// The scope's name, with the suffix `.scope`.
    pub unit: Unit,
    /// Maximum number of its threads.
    pub max_tasks: u64,
}

/// Error of a request to systemd.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// The scope cannot be started.
    #[error("failed to start systemd unit {unit} in {slice}")]
    Start {
        /// The scope.
        unit: String,
        /// Its slice.
        slice: String,
        /// The cause.
        #[source]
        source: CallError,
    },
    /// The properties cannot be set.
    #[error("failed to set properties of systemd unit {unit}")]
    Set {
        /// The scope.
        unit: String,
        /// The cause.
        #[source]
        source: CallError,
    },
    /// The scope cannot be stopped.
    #[error("failed to stop systemd unit {unit}")]
    Stop {
        /// The scope.
        unit: String,
        /// The cause.
        #[source]
        source: CallError,
    },
}

impl UnitError {
    /// Returns whether another unit already has the name. If not, systemd may still create the unit after an error, for
    /// example if it answers after the timeout.
    pub fn is_name_in_use(&self) -> bool {
        let (Self::Start { source, .. } | Self::Set { source, .. } | Self::Stop { source, .. }) = self;
        source.has_name(UNIT_EXISTS)
    }
}

impl Scope {
    /// Starts the scope and moves process `pid` into it. Blocks until systemd has moved the process.
    ///
    /// # Errors
    /// [`UnitError::Start`], for example if an active unit has the same name.
    pub fn start(&self, pid: u32) -> Result<(), UnitError> {
        self.start_at(Path::new(SOCKET), pid)
    }

    fn start_at(&self, socket: &Path, pid: u32) -> Result<(), UnitError> {
        let Self { slice, unit: Unit(unit), .. } = self;
        let properties = self.properties(pid);
        let start = |connection: &mut Connection| {
            let body = Body::default().text(unit).text("replace").properties(&properties).empty_structures();
            connection.run_job(unit, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        };
        let start_or_recover = |connection: &mut Connection| match start(connection) {
            // `with_connection` has retried the request. The first attempt created the scope, but systemd re-executed
            // itself before it sent the reply.
            Err(error) if error.has_name(UNIT_EXISTS) && is_member(pid, unit) => Ok(()),
            // The unit may be the failed scope of a deleted sandbox. A failed unit keeps its name in use until the
            // unit is reset or removed.
            Err(error) if error.has_name(UNIT_EXISTS) => {
                reset_failed(connection, unit)?;
                start(connection)
            }
            Err(error @ CallError::Job { .. }) => {
                reset_failed(connection, unit)?;
                Err(error)
            }
            other => other,
        };
        with_connection(socket, START_TIMEOUT, start_or_recover).map_err(|source| UnitError::Start {
            unit: unit.clone(),
            slice: slice.clone(),
            source,
        })
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
            ("TasksMax", Value::U64(self.max_tasks)),
            ("DefaultDependencies", Value::Bool(false)),
            // When the node shuts down, the scope is stopped, and its processes get SIGTERM. A VM has data that only
            // its guest can write to a disk. The order of the stop is the reverse of the order below. The kubelet is
            // stopped first, because it would start the containers again. CRI-O orders the scopes of its containers,
            // too.
            ("Conflicts", Value::Texts(vec!["shutdown.target".into()])),
            ("Before", Value::Texts(["shutdown.target", "kubelet.service"].map(Into::into).into())),
            ("After", Value::Texts(STOPPED_LATER.map(Into::into).into())),
            ("TimeoutStopUSec", Value::U64(SCOPE_STOP_LIMIT_US)),
            // If the OOM killer kills the VMM, the scope fails. With this mode, systemd removes the failed scope.
            ("CollectMode", Value::Text("inactive-or-failed".into())),
        ]
    }
}

impl Unit {
    /// Returns the unit with the name `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Returns the unit's name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Sets properties of the unit. The properties are lost when the node reboots. Blocks the calling
    /// thread.
    ///
    /// systemd writes the properties to the cgroup at once. When another property of the same controller changes, for
    /// example through `systemctl set-property`, systemd writes the properties again.
    pub fn set(&self, properties: &[Property]) -> Result<(), UnitError> {
        let Self(unit) = self;
        let set = |connection: &mut Connection| {
            let body = Body::default().text(unit).bool(true).properties(properties);
            connection.call("SetUnitProperties", "sba(sv)", body).map(drop)
        };
        with_connection(Path::new(SOCKET), SET_TIMEOUT, set)
            .map_err(|source| UnitError::Set { unit: unit.clone(), source })
    }

    /// Stops the unit and terminates its processes. Succeeds if the unit does not exist. Blocks the calling
    /// thread.
    pub fn stop(&self) -> Result<(), UnitError> {
        self.stop_at(Path::new(SOCKET))
    }

    fn stop_at(&self, socket: &Path) -> Result<(), UnitError> {
        let Self(unit) = self;
        let stop = |connection: &mut Connection| {
            let body = Body::default().text(unit).text("replace");
            match connection.run_job(unit, "StopUnit", "ss", body) {
                Err(error) if error.has_name(NO_SUCH_UNIT) => Ok(()),
                other => other,
            }
        };
        with_connection(socket, STOP_TIMEOUT, stop).map_err(|source| UnitError::Stop { unit: unit.clone(), source })
    }
}

/// Returns whether process `pid` is in the cgroup of `unit`.
fn is_member(pid: u32, unit: &str) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().any(|line| line.rsplit('/').next() == Some(unit))
}

/// Resets the failed state of `unit`. Ignores an error reply from systemd, for example if the unit does not exist.
/// Fails only if systemd sends no valid reply.
fn reset_failed(connection: &mut Connection, unit: &str) -> Result<(), CallError> {
    match connection.call("ResetFailedUnit", "s", Body::default().text(unit)) {
        Err(CallError::Failed { .. }) => Ok(()),
        other => other.map(drop),
    }
}

/// Opens a connection to systemd, runs `act` on the connection, and closes the connection.
///
/// If systemd closes the connection, retries once. systemd closes its connections when it re-executes itself, for
/// example after `systemctl daemon-reexec` or an upgrade.
fn with_connection<T>(
    socket: &Path,
    timeout: Duration,
    mut act: impl FnMut(&mut Connection) -> Result<T, CallError>,
) -> Result<T, CallError> {
    let mut once = || act(&mut Connection::open(socket, timeout)?);
    match once() {
        Err(error) if error.is_disconnected() => once(),
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

    /// Starts a thread that runs a fake systemd with a socket in `dir`. Each element of `connections` describes one
    /// connection. For each call on this connection, the element contains the messages that the fake sends. After the
    /// last call, the fake closes the connection. The thread returns the calls that the fake received.
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
                    let mut call = vec![0; message::FIXED_HEADER];
                    stream.read_exact(&mut call).unwrap();
                    let rest = message::remaining_length(call.first_chunk().unwrap()).unwrap();
                    call.resize(message::FIXED_HEADER + rest, 0);
                    stream.read_exact(&mut call[message::FIXED_HEADER..]).unwrap();
                    calls.push(call);
                    // Send the answer in pieces, because a socket may deliver a message in pieces.
                    for bytes in answer.concat().chunks(7) {
                        stream.get_mut().write_all(bytes).unwrap();
                    }
                }
            }
            calls
        })
    }

    fn scope() -> Scope {
        Scope { slice: "pods.slice".into(), unit: Unit::new("p-n.scope"), max_tasks: 100 }
    }

    fn has(call: &[u8], text: &str) -> bool {
        call.windows(text.len()).any(|part| part == text.as_bytes())
    }

    #[test]
    fn start_and_stop_wait_until_their_jobs_end() {
        let dir = tempfile::tempdir().unwrap();
        // systemd may send the signal JobRemoved before the reply to the call. The signal may concern a different job.
        let early = vec![removed("/job/3", "p-n.scope", "done"), returned(1, "/job/3")];
        let late = vec![returned(1, "/job/4"), removed("/job/3", "x", "failed"), removed("/job/4", "p", "done")];
        let calls = peer(dir.path(), vec![vec![early], vec![late]]);
        let socket = dir.path().join("socket");
        scope().start_at(&socket, 77).unwrap();
        scope().unit.stop_at(&socket).unwrap();
        let calls = calls.join().unwrap();
        for text in
            ["StartTransientUnit", "pods.slice", "Delegate", "TasksMax", "shutdown.target", "containerd.service"]
        {
            assert!(has(&calls[0], text), "the first call does not contain {text}");
        }
        assert!(has(&calls[1], "StopUnit") && has(&calls[1], "p-n.scope"));
    }

    #[test]
    fn start_resets_the_failed_unit_of_an_earlier_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let again = vec![returned(3, "/job/5"), removed("/job/5", "p-n.scope", "done")];
        let none = failed(2, "org.freedesktop.systemd1.NoSuchUnit", "not loaded");
        let calls = peer(dir.path(), vec![vec![vec![failed(1, UNIT_EXISTS, "exists")], vec![none], again]]);
        scope().start_at(&dir.path().join("socket"), 77).unwrap();
        assert!(has(&calls.join().unwrap()[1], "ResetFailedUnit"));
    }

    #[test]
    fn errors_name_the_unit_and_the_cause() {
        let dir = tempfile::tempdir().unwrap();
        let job = vec![returned(1, "/job/6"), removed("/job/6", "p-n.scope", "dependency")];
        let exists = || vec![failed(1, UNIT_EXISTS, "Unit p-n.scope was already loaded")];
        let there = vec![failed(3, UNIT_EXISTS, "Unit p-n.scope was already loaded")];
        let reset = || vec![returned(2, "")];
        let gone = vec![vec![failed(1, NO_SUCH_UNIT, "not loaded")]];
        let peer = peer(dir.path(), vec![vec![job, reset()], vec![exists(), reset(), there], vec![], gone]);
        let socket = dir.path().join("socket");
        let error = crate::chain(&scope().start_at(&socket, 7).unwrap_err());
        let expected = "failed to start systemd unit p-n.scope in pods.slice: \
                        the job of unit p-n.scope ended with result \"dependency\"";
        assert_eq!(error, expected);
        let error = crate::chain(&scope().start_at(&socket, 7).unwrap_err());
        assert!(error.contains("already loaded (org.freedesktop.systemd1.UnitExists)"), "{error}");
        // The fake closes one connection without an answer, as systemd does when it re-executes itself. On the retry's
        // connection, the fake reports that the unit does not exist.
        scope().unit.stop_at(&socket).unwrap();
        assert_eq!(peer.join().unwrap().len(), 6);
        let error = crate::chain(&scope().start_at(&dir.path().join("none"), 7).unwrap_err());
        assert!(error.contains("failed to connect to") && error.contains("none: No such file"), "{error}");
    }
}
