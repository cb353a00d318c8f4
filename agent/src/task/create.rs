//! Create and Start of a container.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::CreateTaskRequest;
use libcontainer::oci_spec::runtime::Spec;
use protobuf::Message;

use super::error::{Fault, unknown};
use super::helper::Job;
use super::process::{Phase, Process, StreamNames};
use super::{Container, STATE, Tasks, check_id, shares_pids, spec, task_dir, volumes};
use crate::cgroup::Cgroup;
use crate::helper::protocol::{CreateRequest, Request};
use crate::io::console::{self, Console};
use crate::io::stdio::{self, Relays, StdioStreams};
use crate::oom::OomWatch;
use crate::reaper::{ProcessExit, now_ns};
use crate::sandbox::users::uid_in_guest;

impl Tasks {
    /// Creates a container; its first process waits for [`Tasks::start_init`].
    ///
    /// # Errors
    /// [`Fault`], worded as runc's shim words it; nothing of the container is left then.
    pub async fn create(&self, request: CreateTaskRequest) -> Result<i32, Fault> {
        check_id(&request.id)?;
        let options = CreateOptions::parse_from_bytes(&request.options.value)
            .map_err(|error| Fault::InvalidArgument(format!("create options: {error}")))?;
        let mut spec: Spec = serde_json::from_slice(&options.spec)
            .map_err(|error| Fault::InvalidArgument(format!("specification: {error}")))?;
        if !request.checkpoint.is_empty() {
            return Err(Fault::Unimplemented("restore from a checkpoint".into()));
        }
        let cgroup = Cgroup::of(&request.id);
        let names = StreamNames {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        // The group's files tell which limits the guest knows.
        let container = {
            let oom = Arc::new(OomWatch::new(&request.id, cgroup.clone(), self.hub.clone()));
            self.sandbox.prepare(None);
            let dir = task_dir(&request.id);
            let fresh = self.get(&request.id).is_err();
            if fresh {
                cgroup.create().map_err(unknown("control group"))?;
            }
            let target = |id: &str| self.process_namespace(id);
            if let Err(fault) = spec::adapt(&mut spec, &options.rootfs, &cgroup, &self.sandbox, target) {
                if fresh {
                    let _ = cgroup.remove();
                }
                return Err(fault);
            }
            if let Some(process) = spec.process_mut() {
                process.set_terminal(Some(request.terminal));
            }
            let linux = spec.linux().as_ref();
            Arc::new(Container {
                id: request.id.clone(),
                bundle: request.bundle.clone(),
                init: Process::new("", names, None),
                seccomp: linux.and_then(|linux| linux.seccomp().clone()),
                oom_score_adj: spec.process().as_ref().and_then(|process| process.oom_score_adj()),
                shares_pids: shares_pids(&spec),
                volumes: volumes::of(&spec),
                oom,
                oom_task: Mutex::default(),
                paused: false.into(),
                execs: Mutex::default(),
                cgroup,
                dir,
            })
        };
        self.insert(&container)?;
        match self.create_inner(&container, &spec).await {
            Ok(pid) => Ok(pid),
            Err(fault) => {
                container.init.advance(Phase::Stopped(0, ProcessExit { status: 255, at_ns: now_ns() }));
                self.clean(&container).await;
                self.forget(&container.id);
                Err(fault)
            }
        }
    }

    /// The process namespace of a container that runs, for another one to join.
    fn process_namespace(&self, id: &str) -> Result<PathBuf, Fault> {
        match self.get(id)?.init.phase() {
            Phase::Created(pid) | Phase::Running(pid) => Ok(format!("/proc/{pid}/ns/pid").into()),
            _ => Err(Fault::FailedPrecondition(format!("container {id} does not run: its process namespace is gone"))),
        }
    }

    async fn create_inner(&self, container: &Arc<Container>, spec: &Spec) -> Result<i32, Fault> {
        let _guard = self.reaper.expect();
        std::fs::create_dir_all(&container.dir).map_err(unknown("task directory"))?;
        std::fs::create_dir_all(STATE).map_err(unknown("state directory"))?;
        let json = serde_json::to_vec(spec).map_err(unknown("specification"))?;
        std::fs::write(container.dir.join("config.json"), json).map_err(unknown("specification"))?;
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        let uid = uid_in_guest(self.sandbox.id_mappings().as_ref(), uid);
        let names = &container.init.names;
        let dialled = self.dialled(names).await?;
        let (console, relays, io, dialled) = if names.terminal {
            let console = Console::listen().map_err(unknown("console socket"))?;
            (Some(console), None, stdio::null_stdio().map_err(unknown("standard streams"))?, Some(dialled))
        } else {
            let (relays, io) = Relays::pipes(dialled, uid).map_err(unknown("standard streams"))?;
            (None, Some(relays), io, None)
        };
        let request = Request::Create(CreateRequest {
            id: container.id.clone(),
            bundle: container.dir.clone(),
            state_root: PathBuf::from(STATE),
            cgroup: container.cgroup.path().to_owned(),
            console: console.as_ref().map(|console| console.path().to_owned()),
        });
        let job = Job {
            role: crate::helper::CREATE,
            request,
            request_file: &container.file("", "req"),
            response_file: &container.file("", "rsp"),
            io,
            console,
        };
        let (pid, master) = self.help(job).await.map_err(|reason| {
            Fault::Unknown(format!(
                "OCI runtime create failed: runc create failed: unable to start container process: {reason}"
            ))
        })?;
        let relays = match (relays, &master, dialled) {
            (Some(relays), _, _) => relays,
            (None, Some(master), Some(dialled)) => {
                console::chown_slave(master, uid);
                Relays::terminal(dialled, master).map_err(unknown("terminal"))?
            }
            _ => return Err(Fault::Unknown("no terminal came".into())),
        };
        container.init.attach(relays.start(), master);
        container.init.advance(Phase::Created(pid));
        self.follow(container, &container.init, pid);
        let watching = tokio::spawn(container.oom.clone().run()).abort_handle();
        *container.oom_task.lock().unwrap_or_else(PoisonError::into_inner) = Some(watching);
        Ok(pid)
    }

    /// The streams a request named.
    pub(super) async fn dialled(&self, names: &StreamNames) -> Result<StdioStreams, Fault> {
        let invalid = |error| Fault::InvalidArgument(format!("streams: {error}"));
        if names.terminal && names.stdin == names.stdout {
            return Ok(StdioStreams {
                stdout: self.streams.take(&names.stdout).await.map_err(invalid)?,
                ..Default::default()
            });
        }
        Ok(StdioStreams {
            stdin: self.streams.take(&names.stdin).await.map_err(invalid)?,
            stdout: self.streams.take(&names.stdout).await.map_err(invalid)?,
            stderr: self.streams.take(&names.stderr).await.map_err(invalid)?,
        })
    }

    /// Lets a created container's first process go.
    ///
    /// # Errors
    /// [`Fault`] when it is not waiting.
    pub fn start_init(&self, container: &Arc<Container>) -> Result<i32, Fault> {
        match container.init.phase() {
            Phase::Created(pid) => {
                // libcontainer's init accepts one connection on this socket and goes on when it ends.
                let socket = PathBuf::from(STATE).join(&container.id).join("notify.sock");
                let go = || -> std::io::Result<()> {
                    use std::io::Write;
                    UnixStream::connect(&socket)?.write_all(b"start container")
                };
                go().map_err(unknown("start"))?;
                container.init.advance(Phase::Running(pid));
                Ok(pid)
            }
            Phase::Running(_) => Err(Fault::FailedPrecondition("cannot start a running container".into())),
            Phase::Stopped(..) => Err(Fault::FailedPrecondition("cannot start a stopped container".into())),
            Phase::New | Phase::Starting => Err(Fault::FailedPrecondition("the container is not created yet".into())),
        }
    }
}
