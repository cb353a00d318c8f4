//! Containers and their processes.

mod create;
mod devices;
pub mod error;
mod exec;
mod helper;
mod kill;
mod process;
mod remove;
pub mod service;
mod spec;
pub mod volumes;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use husk_proto::agent::Exit;
use libcontainer::oci_spec::runtime::{LinuxSeccomp, Spec};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::events::Hub;
use crate::io::streams::Streams;
use crate::oom::OomWatch;
use crate::reaper::{ProcessExit, Reaper};
use crate::sandbox::Sandbox;
use error::Fault;
use process::{Phase, Process};

/// Where requests to and answers from the helper, bundles and console sockets live, one directory per container.
const RUN: &str = "/run/husk/tasks";
/// libcontainer's own state.
const STATE: &str = "/run/husk/state";

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// The bundle on the host, as the request named it.
    pub bundle: String,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its first process.
    pub init: Arc<Process>,
    dir: PathBuf,
    seccomp: Option<LinuxSeccomp>,
    oom_score_adj: Option<i32>,
    shares_pids: bool,
    /// What it has of the shared file system.
    volumes: Vec<PathBuf>,
    oom: Arc<OomWatch>,
    oom_task: Mutex<Option<AbortHandle>>,
    paused: AtomicBool,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// The process `exec_id`, the first one if that is empty.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Fault> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        execs.get(exec_id).cloned().ok_or_else(|| Fault::NotFound(format!("exec {exec_id}")))
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Where the helper for `exec_id` finds its request.
    fn file(&self, exec_id: &str, suffix: &str) -> PathBuf {
        // An exec id is the client's; hexadecimal is a file name whatever it holds.
        let name: String = exec_id.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(format!("p{name}.{suffix}"))
    }
}

/// All containers of the sandbox.
pub struct Tasks {
    containers: Mutex<HashMap<String, Arc<Container>>>,
    hub: Hub,
    streams: Streams,
    reaper: Reaper,
    sandbox: Arc<Sandbox>,
}

impl Tasks {
    /// None yet.
    pub fn new(hub: Hub, streams: Streams, reaper: Reaper, sandbox: Arc<Sandbox>) -> Self {
        Self { containers: Mutex::default(), hub, streams, reaper, sandbox }
    }

    /// The container `id`.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Fault> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.get(id).cloned().ok_or_else(|| Fault::NotFound(format!("task {id}")))
    }

    fn insert(&self, container: &Arc<Container>) -> Result<(), Fault> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if containers.contains_key(&container.id) {
            return Err(Fault::AlreadyExists(format!("task {}", container.id)));
        }
        containers.insert(container.id.clone(), container.clone());
        Ok(())
    }

    /// Whether another container than `id` has `path` of the shared file system.
    fn is_shared(&self, path: &Path, id: &str) -> bool {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.values().any(|other| other.id != id && other.volumes.iter().any(|volume| volume == path))
    }

    fn forget(&self, id: &str) {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// From now on the end of `pid` is the end of `process`: its event goes out, after an out-of-memory kill's.
    fn follow(&self, container: &Arc<Container>, process: &Arc<Process>, pid: i32) {
        let (container, process, hub) = (container.clone(), process.clone(), self.hub.clone());
        self.reaper.claim(pid, move |ended: ProcessExit| {
            let oom = container.oom.check();
            if process.exec_id.is_empty() && container.shares_pids {
                // Nothing else ends what it leaves behind when the namespace lives on.
                let _ = container.cgroup.kill();
            }
            process.advance(Phase::Stopped(pid, ended));
            process.detach();
            hub.exit(Exit {
                container_id: container.id.clone(),
                exec_id: process.exec_id.clone(),
                pid: pid.unsigned_abs(),
                status: ended.status,
                exited_at_ns: ended.at_ns,
                oom,
                ..Default::default()
            });
        });
    }
}

/// Ids become file names.
fn check_id(id: &str) -> Result<(), Fault> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    let ok = !id.is_empty() && id.len() <= 128 && id.chars().all(good) && id != "." && id != "..";
    if ok { Ok(()) } else { Err(Fault::InvalidArgument(format!("container id {id:?}"))) }
}

fn shares_pids(spec: &Spec) -> bool {
    use libcontainer::oci_spec::runtime::LinuxNamespaceType::Pid;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.typ() == Pid && namespace.path().is_some())
}

fn task_dir(id: &str) -> PathBuf {
    Path::new(RUN).join(id)
}
