//! Containers and their processes.

mod create;
mod delete;
mod devices;
mod exec;
mod freeze;
#[cfg(test)]
mod hang_tests;
mod helper;
mod kill;
mod process;
pub mod service;
pub(crate) mod spec;
mod time_namespace;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use husk_base::sync::lock;
use husk_proto::agent::Exit;
use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process as ProcessSpec, Spec};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::cgroup::{self, Cgroup};
use crate::error::ServiceError;
use crate::events::EventHub;
use crate::io::streams::Streams;
use crate::oom::OomWatch;
use crate::reaper::{ProcessExit, Reaper};
use crate::sandbox::Sandbox;
use freeze::Freezer;
use process::{Phase, Process};

/// Directory with one subdirectory per container. A subdirectory holds the container's bundle, and the requests and
/// responses of the container's helpers.
const TASKS_DIR: &str = "/run/husk/tasks";
/// Directory of libcontainer's state.
const STATE_DIR: &str = "/run/husk/state";

/// A container.
pub struct Container {
    /// Container id.
    pub id: String,
    /// Path of the bundle on the host, as given in the request.
    pub bundle: String,
    /// Cgroup of the container.
    pub cgroup: Cgroup,
    /// First process of the container.
    pub init: Arc<Process>,
    dir: PathBuf,
    /// The object `process` of the specification. The agent policy compares each exec with this object.
    process: ProcessSpec,
    seccomp: Option<LinuxSeccomp>,
    oom_score_adj: Option<i32>,
    shares_pid_namespace: bool,
    /// Volumes of the container that are in the share.
    volumes: Vec<PathBuf>,
    oom: Arc<OomWatch>,
    oom_task: Mutex<Option<AbortHandle>>,
    paused: AtomicBool,
    freezer: Freezer,
    /// The one permit belongs to the Update request that changes the cgroup.
    update_turn: Arc<Semaphore>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// Returns the process `exec_id`, or the init if `exec_id` is empty.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ServiceError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let execs = lock(&self.execs);
        execs.get(exec_id).cloned().ok_or_else(|| ServiceError::NotFound(format!("exec {exec_id}")))
    }

    /// Whether the container is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Returns the path of the request or response file of the helper that starts `exec_id`.
    fn helper_file(&self, exec_id: &str, suffix: &str) -> PathBuf {
        // The client chooses the exec id, which may contain a slash. Its hexadecimal form is a valid file name.
        let name: String = exec_id.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(format!("p{name}.{suffix}"))
    }
}

/// All containers of the sandbox.
pub struct Tasks {
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Ids of containers that are being created, but are not in `containers` yet.
    reserved: watch::Sender<HashSet<String>>,
    hub: EventHub,
    streams: Streams,
    reaper: Reaper,
    sandbox: Arc<Sandbox>,
    /// Mount point of the cgroup hierarchy.
    cgroups: PathBuf,
}

impl Tasks {
    /// Creates the table of containers, which is empty at first.
    pub fn new(hub: EventHub, streams: Streams, reaper: Reaper, sandbox: Arc<Sandbox>) -> Self {
        Self {
            containers: Mutex::default(),
            reserved: Default::default(),
            hub,
            streams,
            reaper,
            sandbox,
            cgroups: cgroup::MOUNT.into(),
        }
    }

    /// Returns the container `id`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        let containers = lock(&self.containers);
        containers.get(id).cloned().ok_or_else(|| ServiceError::NotFound(format!("task {id}")))
    }

    /// Reserves `id` for a new container, until the reservation is dropped.
    fn reserve(&self, id: &str) -> Result<Reservation<'_>, ServiceError> {
        if self.get(id).is_ok() || !self.reserved.send_if_modified(|ids| ids.insert(id.to_owned())) {
            return Err(ServiceError::AlreadyExists(format!("task {id}")));
        }
        Ok(Reservation { tasks: self, id: id.to_owned() })
    }

    /// Waits while `id` is reserved.
    async fn wait_unreserved(&self, id: &str) {
        let _ = self.reserved.subscribe().wait_for(|ids| !ids.contains(id)).await;
    }

    fn insert(&self, container: &Arc<Container>) -> Result<(), ServiceError> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(&container.id) {
            return Err(ServiceError::AlreadyExists(format!("task {}", container.id)));
        }
        containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    /// Whether a container other than `id` uses the shared volume `path`.
    fn is_used_by_another(&self, path: &Path, id: &str) -> bool {
        let containers = lock(&self.containers);
        containers.values().any(|other| other.id != id && other.volumes.iter().any(|volume| volume == path))
    }

    fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    /// When `pid` exits, stores the exit in `process` and publishes an exit event. If an OOM kill has occurred, its
    /// event is published before the exit event.
    fn watch_exit(&self, container: &Arc<Container>, process: &Arc<Process>, pid: i32) {
        let (container, process, hub) = (container.clone(), process.clone(), self.hub.clone());
        self.reaper.on_exit(pid, move |exit: ProcessExit| {
            if process.exec_id.is_empty() && container.shares_pid_namespace {
                // The shared PID namespace outlives this init. Therefore the agent, not the kernel, kills the
                // container's other processes. Meanwhile, nothing may use the PID, because the init is reaped.
                process.advance(Phase::Exiting(pid));
                tokio::spawn(async move {
                    kill::rest(&container).await;
                    record_exit(&container, &process, &hub, pid, exit);
                });
            } else {
                record_exit(&container, &process, &hub, pid, exit);
            }
        });
    }
}

/// The id of a container that is being created.
struct Reservation<'a> {
    tasks: &'a Tasks,
    id: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.tasks.reserved.send_if_modified(|ids| ids.remove(&self.id));
    }
}

/// Stores the exit of a process, and publishes its event.
fn record_exit(container: &Container, process: &Process, hub: &EventHub, pid: i32, exit: ProcessExit) {
    let oom = container.oom.check();
    process.advance(Phase::Stopped(pid, exit));
    process.detach_io();
    hub.exit(Exit {
        container_id: container.id.clone(),
        exec_id: process.exec_id.clone(),
        pid: pid.unsigned_abs(),
        status: exit.status,
        exited_at_ns: exit.at_ns,
        oom,
        ..Default::default()
    });
}

/// Checks that a container id can be used as a file name.
pub(crate) fn check_id(id: &str) -> Result<(), ServiceError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    let ok = !id.is_empty() && id.len() <= 128 && id.chars().all(allowed) && id != "." && id != "..";
    if ok {
        Ok(())
    } else {
        Err(ServiceError::InvalidArgument(format!(
            "invalid container id {id:?}: must be 1 to 128 characters from A-Z a-z 0-9 _ - . +, but not . or .. alone"
        )))
    }
}

pub(crate) fn shares_pid_namespace(spec: &Spec) -> bool {
    use libcontainer::oci_spec::runtime::LinuxNamespaceType::Pid;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.typ() == Pid && namespace.path().is_some())
}

fn task_dir(id: &str) -> PathBuf {
    Path::new(TASKS_DIR).join(id)
}
