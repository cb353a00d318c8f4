//! The Create and Start requests of a container.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use husk_base::sync::lock;
use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::CreateTaskRequest;
use libcontainer::oci_spec::runtime::Spec;
use protobuf::Message;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::helper::HelperJob;
use super::kill::KILL_TIMEOUT;
use super::process::{Phase, Process, StreamTokens};
use super::{Container, STATE_DIR, Tasks, check_id, shares_pid_namespace, spec, task_dir};
use crate::blocking;
use crate::cgroup::Cgroup;
use crate::error::{ServiceError, failed, malformed};
use crate::helper::protocol::{CreateRequest, Request};
use crate::id_mappings::uid_in_guest;
use crate::io::console::{self, Console};
use crate::io::stdio::{self, Relays, StdioStreams};
use crate::oom::OomWatch;
use crate::reaper::{ProcessExit, now_ns};
use crate::shared_volumes;

fn parse(request: &CreateTaskRequest) -> Result<(CreateOptions, Spec), ServiceError> {
    let options = CreateOptions::parse_from_bytes(&request.options.value)
        .map_err(malformed("failed to parse the create options"))?;
    let spec = serde_json::from_slice(&options.spec).map_err(malformed("failed to parse the specification"))?;
    Ok((options, spec))
}

impl Tasks {
    /// Creates a container. Its init waits for [`Tasks::start_init`].
    ///
    /// # Errors
    /// Uses the error texts of runc's shim. After an error, no part of the container remains.
    pub async fn create(&self, request: CreateTaskRequest) -> Result<i32, ServiceError> {
        let tokens = StreamTokens {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        // Take the streams first, so that a request that fails closes its streams. Otherwise, the streams would stay
        // in the table of `Streams`.
        let streams = self.take_streams(&tokens).await?;
        check_id(&request.id)?;
        let (options, spec) = parse(&request)?;
        if !request.checkpoint.is_empty() {
            return Err(ServiceError::Unimplemented("restoring from a checkpoint is not supported"));
        }
        self.sandbox.policy.check_container(&spec, &request, &options.rootfs)?;
        self.create_checked(request, options, spec, tokens, streams).await
    }

    /// Creates a container of the agent itself, without standard streams. No policy applies to it.
    ///
    /// # Errors
    /// As for [`Tasks::create`].
    pub async fn create_own(&self, request: CreateTaskRequest) -> Result<i32, ServiceError> {
        let (options, spec) = parse(&request)?;
        self.create_checked(request, options, spec, StreamTokens::default(), StdioStreams::default()).await
    }

    async fn create_checked(
        &self,
        request: CreateTaskRequest,
        options: CreateOptions,
        mut spec: Spec,
        tokens: StreamTokens,
        streams: StdioStreams,
    ) -> Result<i32, ServiceError> {
        let reservation = self.reserve(&request.id)?;
        self.sandbox.prepare(None).map_err(failed("prepare the pod's namespaces"))?;
        if spec::joins_shared_pid_namespace(&spec) {
            self.sandbox.create_shared_pid().await.map_err(failed("create the shared PID namespace"))?;
        }
        let cgroup = Cgroup::below(&self.cgroups, &request.id);
        // The PID namespace of another container, which stays open until the helper has opened it. A path with the PID
        // of the other container's init could lead to another process.
        let mut pid_namespace = None;
        // The cgroup is created before the specification is adapted, because the cgroup's files show which limits the
        // guest kernel supports.
        let container = {
            let oom = Arc::new(OomWatch::new(&request.id, cgroup.clone(), self.hub.clone()));
            let dir = task_dir(&request.id);
            let new = cgroup.clone();
            blocking::run("create the cgroup", move || new.create()).await?;
            let target = |id: &str| -> Result<PathBuf, ServiceError> {
                let namespace = pid_namespace.insert(self.pid_namespace(id)?);
                Ok(format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd()).into())
            };
            if let Err(error) = spec::adapt(&mut spec, &options.rootfs, &cgroup, &self.sandbox, target) {
                let _ = blocking::run("remove the cgroup", move || cgroup.remove()).await;
                return Err(error);
            }
            if let Some(process) = spec.process_mut() {
                process.set_terminal(Some(request.terminal));
            }
            let linux = spec.linux().as_ref();
            Arc::new(Container {
                id: request.id.clone(),
                bundle: request.bundle.clone(),
                init: Process::new("", tokens, None),
                process: spec.process().clone().unwrap_or_default(),
                seccomp: linux.and_then(|linux| linux.seccomp().clone()),
                oom_score_adj: spec.process().as_ref().and_then(|process| process.oom_score_adj()),
                shares_pid_namespace: shares_pid_namespace(&spec),
                volumes: shared_volumes::of_spec(&spec),
                oom,
                oom_task: Mutex::default(),
                paused: false.into(),
                freezer: Default::default(),
                update_turn: Arc::new(Semaphore::new(1)),
                execs: Mutex::default(),
                cgroup,
                dir,
            })
        };
        self.insert(&container)?;
        drop(reservation);
        let created = self.create_inserted(&container, &spec, streams).await;
        drop(pid_namespace);
        match created {
            Ok(pid) => Ok(pid),
            Err(error) => {
                container.init.advance(Phase::Stopped(0, ProcessExit { status: 255, at_ns: now_ns() }));
                self.cleanup(&container, Instant::now() + KILL_TIMEOUT).await;
                self.remove(&container.id);
                Err(error)
            }
        }
    }

    /// Opens a running container's PID namespace, so that another container can join that namespace.
    pub(super) fn pid_namespace(&self, id: &str) -> Result<File, ServiceError> {
        match self.get(id)?.init.phase() {
            // The init is a child of the agent, and the async thread has not reaped it. Therefore, no other process has
            // its PID.
            Phase::Created(pid) | Phase::Running(pid) => File::open(format!("/proc/{pid}/ns/pid"))
                .map_err(failed(format!("open the PID namespace of container {id}"))),
            _ => Err(ServiceError::FailedPrecondition(format!(
                "failed to join the PID namespace of container {id}: the container is not running"
            ))),
        }
    }

    async fn create_inserted(
        &self,
        container: &Arc<Container>,
        spec: &Spec,
        streams: StdioStreams,
    ) -> Result<i32, ServiceError> {
        let _guard = self.reaper.keep_unclaimed_exits();
        std::fs::create_dir_all(&container.dir).map_err(failed("create the task directory"))?;
        std::fs::create_dir_all(STATE_DIR).map_err(failed("create the state directory"))?;
        let json = serde_json::to_vec(spec).map_err(failed("serialise the specification"))?;
        std::fs::write(container.dir.join("config.json"), json).map_err(failed("write the specification"))?;
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        let uid = uid_in_guest(self.sandbox.id_mappings().as_ref(), uid);
        let tokens = &container.init.tokens;
        let (console, relays, io, streams) = if tokens.terminal {
            let console = Console::listen().map_err(failed("create the console socket"))?;
            (Some(console), None, stdio::null_stdio().map_err(failed("open /dev/null"))?, Some(streams))
        } else {
            let (relays, io) = Relays::pipes(streams, uid).map_err(failed("create pipes for the standard streams"))?;
            (None, Some(relays), io, None)
        };
        let request = Request::Create(CreateRequest {
            id: container.id.clone(),
            bundle: container.dir.clone(),
            state_root: PathBuf::from(STATE_DIR),
            cgroup: container.cgroup.path().to_owned(),
            console: console.as_ref().map(|console| console.path().to_owned()),
        });
        let job = HelperJob {
            role: crate::helper::CREATE,
            request,
            request_file: &container.helper_file("", "req"),
            response_file: &container.helper_file("", "rsp"),
            io,
            console,
            inherited: None,
        };
        let (pid, master) = self.run_helper(job).await.map_err(|reason| {
            ServiceError::Unknown(format!(
                "OCI runtime create failed: runc create failed: unable to start container process: {reason}"
            ))
        })?;
        let relays = match (relays, &master, streams) {
            (Some(relays), _, _) => relays,
            (None, Some(master), Some(streams)) => {
                console::chown_slave(master, uid);
                Relays::terminal(streams, master).map_err(failed("set up the terminal's relays"))?
            }
            _ => return Err(ServiceError::Unknown("failed to receive the terminal from the helper".into())),
        };
        container.init.attach_io(relays.start(), master);
        container.init.advance(Phase::Created(pid));
        self.watch_exit(container, &container.init, pid);
        let watch_task = tokio::spawn(container.oom.clone().run()).abort_handle();
        *lock(&container.oom_task) = Some(watch_task);
        Ok(pid)
    }

    /// Takes the streams that a request names.
    pub(super) async fn take_streams(&self, tokens: &StreamTokens) -> Result<StdioStreams, ServiceError> {
        let invalid = |error| malformed("failed to get the streams for the stream tokens of the request")(error);
        if tokens.terminal && tokens.stdin == tokens.stdout {
            return Ok(StdioStreams {
                stdout: self.streams.take(&tokens.stdout).await.map_err(invalid)?,
                ..Default::default()
            });
        }
        Ok(StdioStreams {
            stdin: self.streams.take(&tokens.stdin).await.map_err(invalid)?,
            stdout: self.streams.take(&tokens.stdout).await.map_err(invalid)?,
            stderr: self.streams.take(&tokens.stderr).await.map_err(invalid)?,
        })
    }

    /// Starts the init of a created container.
    pub fn start_init(&self, container: &Arc<Container>) -> Result<i32, ServiceError> {
        match container.init.phase() {
            Phase::Created(pid) => {
                // libcontainer's init accepts one connection on this socket, and continues when the connection is
                // closed.
                let socket = PathBuf::from(STATE_DIR).join(&container.id).join("notify.sock");
                let notify_init = || -> std::io::Result<()> {
                    use std::io::Write;
                    UnixStream::connect(&socket)?.write_all(b"start container")
                };
                notify_init().map_err(failed("start the init of the container"))?;
                container.init.advance(Phase::Running(pid));
                Ok(pid)
            }
            Phase::Running(_) => Err(ServiceError::FailedPrecondition("cannot start a running container".into())),
            Phase::Exiting(_) | Phase::Stopped(..) => {
                Err(ServiceError::FailedPrecondition("cannot start a stopped container".into()))
            }
            Phase::New | Phase::Starting => {
                Err(ServiceError::FailedPrecondition("the container is not created yet".into()))
            }
        }
    }
}
