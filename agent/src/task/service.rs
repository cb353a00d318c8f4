//! Implements containerd's Task service for the shim, with the guest's paths and PIDs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use husk_base::failpoint;
use husk_proto::containerd::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use husk_proto::containerd::shim_async::Task;
use husk_proto::metrics;
use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::{Manager, V2ManagerError};
use libcontainer::oci_spec::runtime::LinuxResources;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::time::timeout;
use ttrpc::asynchronous::TtrpcContext;

use super::process::Phase;
use super::{Tasks, freeze, kill, spec};
use crate::blocking;
use crate::cgroup::Cgroup;
use crate::error::{ServiceError, failed, malformed};

/// Maximum time that an Update request waits for an earlier one of the same container. This is shorter than the shim's
/// timeout of 10 s, so that the client learns that its update has not been made.
const UPDATE_TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// Implementation of the Task service.
pub struct TaskService {
    tasks: Arc<Tasks>,
}

impl TaskService {
    /// Creates the service for `tasks`.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }
}

/// Runs `work` as a separate task, so that `work` completes even if the client's connection is lost.
async fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> Result<T, ServiceError> {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(failed("complete the request")(error)))
}

fn timestamp(ns: i64) -> MessageField<Timestamp> {
    let (seconds, nanos) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    MessageField::some(Timestamp { seconds, nanos: i32::try_from(nanos).unwrap_or(0), ..Default::default() })
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        failpoint!(async "agent.create").map_err(failed("pass the failpoint"))?;
        let tasks = self.tasks.clone();
        let pid = run_to_completion(async move { tasks.create(request).await }).await?;
        failpoint!(async "agent.created").map_err(failed("pass the failpoint"))?;
        Ok(CreateTaskResponse { pid: pid.unsigned_abs(), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        failpoint!(async "agent.start").map_err(failed("pass the failpoint"))?;
        let container = self.tasks.get(&request.id)?;
        let pid = if request.exec_id.is_empty() {
            self.tasks.start_init(&container)?
        } else {
            let process = container.process(&request.exec_id)?;
            let tasks = self.tasks.clone();
            run_to_completion(async move { tasks.start_exec(&container, &process).await }).await?
        };
        failpoint!(async "agent.started").map_err(failed("pass the failpoint"))?;
        Ok(StartResponse { pid: pid.unsigned_abs(), ..Default::default() })
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        failpoint!(async "agent.delete").map_err(failed("pass the failpoint"))?;
        let tasks = self.tasks.clone();
        let limit = u64::try_from(context.timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos);
        let deleted = async move { tasks.delete(&request.id, &request.exec_id, limit).await };
        let (pid, exit) = run_to_completion(deleted).await?;
        Ok(DeleteResponse {
            pid: pid.unsigned_abs(),
            exit_status: exit.status,
            exited_at: timestamp(exit.at_ns),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.tasks.get(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let phase = process.phase();
        let status = match phase {
            Phase::Stopped(..) => Status::STOPPED,
            Phase::Running(_) | Phase::Exiting(_) if container.is_paused() => Status::PAUSED,
            Phase::Running(_) | Phase::Exiting(_) => Status::RUNNING,
            _ => Status::CREATED,
        };
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.clone(),
            pid: phase.pid().unsigned_abs(),
            status: status.into(),
            stdin: process.tokens.stdin.clone(),
            stdout: process.tokens.stdout.clone(),
            stderr: process.tokens.stderr.clone(),
            terminal: process.tokens.terminal,
            ..Default::default()
        };
        if let Phase::Stopped(_, exit) = phase {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit.at_ns);
        }
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        failpoint!(async "agent.exec").map_err(failed("pass the failpoint"))?;
        let tasks = self.tasks.clone();
        run_to_completion(async move { tasks.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.tasks.get(&request.id)?.process(&request.exec_id)?;
        process.resize(request.width, request.height)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.tasks.get(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        failpoint!(async "agent.kill").map_err(failed("pass the failpoint"))?;
        let container = self.tasks.get(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let signal = i32::try_from(request.signal).unwrap_or(-1);
        if request.exec_id.is_empty() {
            if request.all { kill::all(&container, signal).await? } else { process.signal(signal)? }
        } else if signal == libc::SIGKILL {
            run_to_completion(async move { kill::exec(&container, &process).await }).await?;
        } else {
            process.signal(signal)?;
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.tasks.get(&request.id)?;
        let info = |pid: i32| ProcessInfo { pid: pid.unsigned_abs(), ..Default::default() };
        // A container can have created any number of cgroups.
        let pids = blocking::run("read the PIDs", move || io::Result::Ok(container.cgroup.pids())).await?;
        let processes = pids.into_iter().map(info).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request.id, true).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request.id, false).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(ServiceError::Unimplemented("checkpointing a container is not supported").into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.get(&request.id)?;
        let mut resources: LinuxResources =
            serde_json::from_slice(&request.resources.value).map_err(malformed("failed to parse the resources"))?;
        spec::adapt_resources(&mut resources, &container.cgroup)?;
        let turn = timeout(UPDATE_TURN_TIMEOUT, Arc::clone(&container.update_turn).acquire_owned()).await;
        let turn = turn.map_err(|_| {
            ServiceError::FailedPrecondition(format!(
                "failed to update container {}: another update is in progress, and has not ended within {} s",
                request.id,
                UPDATE_TURN_TIMEOUT.as_secs()
            ))
        })?;
        // If a memory limit is lowered, the kernel reclaims memory before the write returns. This can take long, and
        // must not block the agent's only async thread. The turn ends with the last write, even if the client has given
        // up. Otherwise, a later request could be undone by the rest of this one.
        let update = move || {
            let _turn = turn;
            apply(&container.cgroup, &resources)
        };
        blocking::run("update the resources", update).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.tasks.get(&request.id)?.process(&request.exec_id)?;
        let (_, exit) = process.wait().await.ok_or_else(|| ServiceError::NotFound("process".into()))?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit.at_ns), ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.tasks.get(&request.id)?;
        // The kernel adds up the counters of all cgroups that the container has created.
        let read = move || metrics::read(container.cgroup.path()).write_to_bytes();
        let value = blocking::run("read the metrics", read).await?;
        let stats = MessageField::some(Any { type_url: metrics::TYPE_URL.into(), value, ..Default::default() });
        Ok(StatsResponse { stats, ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let container = self.tasks.get(&request.id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.init.phase().pid().unsigned_abs(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // This request needs no action, because the VM ends with the VMM process.
        Ok(Empty::new())
    }
}

impl TaskService {
    /// Freezes or thaws a container. Runs to completion, so that a failed change is undone even if the client
    /// disconnects.
    async fn freeze(&self, id: &str, frozen: bool) -> ttrpc::Result<Empty> {
        let container = self.tasks.get(id)?;
        run_to_completion(async move { freeze::set(&container, frozen).await }).await?;
        Ok(Empty::new())
    }
}

/// Sets the limits of a container's cgroup. Blocks while the kernel reclaims memory.
fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<(), V2ManagerError> {
    let manager = Manager::new(cgroup.root().to_owned(), cgroup.name().to_owned())?;
    manager.apply(&ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None })
}
