//! Serves containerd's Task API, under the service names of versions 2 and 3.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use husk_proto::containerd::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use husk_proto::containerd::events::task::{TaskPaused, TaskResumed};
use husk_proto::containerd::shim_async::{Task, create_task};
use husk_proto::containerd::topics::{TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC};
use husk_proto::metrics;
use protobuf::well_known_types::any::Any;
use tokio::time::Instant;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::Shim;
use crate::container::containers::Container;
use crate::container::process::State;
use crate::error::ServiceError;
use crate::events::timestamp;
use crate::oci;
use crate::vm::agent;
use crate::vm::agent::{timeouts, within};

/// Maximum number of processes in a response to Pids.
const MAX_PIDS: usize = 1 << 16;
/// Maximum size, in bytes, of a container's statistics in the agent's response to Stats.
const MAX_METRICS: usize = 1 << 20;

/// Returns the Task service under the names of versions 2 and 3. Both versions have the same messages.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let methods = create_task(Arc::new(Handler { shim: Arc::clone(shim) }));
        services.extend(methods.into_values().map(|service| (name.to_owned(), service)));
    }
    services
}

struct Handler {
    shim: Arc<Shim>,
}

impl Handler {
    fn container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        self.shim.containers.get(id)
    }

    /// Returns the container `id`. Fails for a sandbox container, because a sandbox container has no processes in the
    /// guest.
    fn guest_container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        self.container(id).and_then(|container| {
            if container.is_sandbox_container() { Err(ServiceError::Sandbox) } else { Ok(container) }
        })
    }

    fn is_running(container: &Container) -> Result<(), &'static str> {
        match container.init.state() {
            State::Running if container.is_paused() => Err("paused"),
            State::Running => Ok(()),
            state => Err(state.name()),
        }
    }
}

#[async_trait]
impl Task for Handler {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let state = process.state();
        let exit = process.exit();
        let status = match state {
            State::Created | State::Starting => Status::CREATED,
            State::Running if container.is_paused() && process.exec.is_empty() => Status::PAUSED,
            State::Running => Status::RUNNING,
            State::Stopped | State::Deleted => Status::STOPPED,
        };
        let unstarted_exec = !process.exec.is_empty() && state == State::Created;
        Ok(StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            pid: if unstarted_exec { 0 } else { self.shim.pid(&container.id) },
            status: status.into(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: process.exec.clone(),
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        self.shim.create(request).await?;
        Ok(CreateTaskResponse { pid: self.shim.pid(&id), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            self.shim.start_init(&container).await?;
        } else {
            let exec = container.exec(&request.exec_id)?;
            self.shim.start_exec(&container, &exec).await?;
        }
        Ok(StartResponse { pid: self.shim.pid(&container.id), ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let begin = Instant::now();
        if request.exec_id.is_empty() {
            self.shim.cancel_creation(&request.id).await;
        }
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            return Ok(self.shim.delete_container(&container, begin).await?);
        }
        let exec = container.exec(&request.exec_id)?;
        Ok(self.shim.delete_exec(&container, &exec).await?)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.container(&request.id)?;
        // Return the PID of a container even after the container has exited. If the response had no PID, a restarted
        // containerd would delete the container and lose the exit status (1.7 and 2.1, shim_load.go, loadShims).
        if container.is_sandbox_container() || container.init.exit().is_some() {
            let one = ProcessInfo { pid: self.shim.pid(&container.id), ..Default::default() };
            return Ok(PidsResponse { processes: vec![one], ..Default::default() });
        }
        let guest = PidsRequest { id: container.id.clone(), ..Default::default() };
        let answer = match self.shim.agent().await {
            Ok(agent) => agent.query(|context| agent.task.pids(context, &guest)).await,
            Err(error) => Err(error.into()),
        };
        let processes = match answer {
            Ok(answer) => {
                let processes = answer.processes.iter().take(MAX_PIDS);
                processes.map(|p| ProcessInfo { pid: p.pid, ..Default::default() }).collect()
            }
            // A restarted containerd gives a task up whose shim returns an error or no PID, and lets the kubelet start
            // the container again (1.7 and 2.1, shim_load.go, loadShims). But the processes may run on, for example
            // after a VMM that was stopped continues. Therefore this answer must not depend on the guest.
            Err(error) => {
                tracing::warn!(container = container.id, %error, "failed to get the container's PIDs from the agent");
                vec![ProcessInfo { pid: self.shim.pid(&container.id), ..Default::default() }]
            }
        };
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.guest_container(&request.id)?;
        Self::is_running(&container).map_err(ServiceError::Pause)?;
        let guest = PauseRequest { id: container.id.clone(), ..Default::default() };
        let paused = self.shim.agent().await?.task.pause(within(timeouts::QUICK), &guest).await;
        paused.map_err(|error| agent::error("pause", error))?;
        container.set_paused(true);
        let event = TaskPaused { container_id: container.id.clone(), ..Default::default() };
        self.shim.events.publish(TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.guest_container(&request.id)?;
        if Self::is_running(&container) != Err("paused") {
            return Err(ServiceError::Resume(container.init.state().name()).into());
        }
        let guest = ResumeRequest { id: container.id.clone(), ..Default::default() };
        let resumed = self.shim.agent().await?.task.resume(within(timeouts::QUICK), &guest).await;
        resumed.map_err(|error| agent::error("resume", error))?;
        container.set_paused(false);
        let event = TaskResumed { container_id: container.id.clone(), ..Default::default() };
        self.shim.events.publish(TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(ServiceError::Unsupported("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        self.shim.kill(&container, &request).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        self.shim.add_exec(&container, &request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        match process.state() {
            State::Stopped | State::Deleted => return Err(ServiceError::Resize.into()),
            // The agent may not know the exec before the exec has started. As runc's shim does, ignore the request.
            State::Created | State::Starting if !process.exec.is_empty() => return Ok(Empty::new()),
            _ => {}
        }
        let guest = ResizePtyRequest {
            id: container.id.clone(),
            exec_id: process.exec.clone(),
            width: request.width.min(u16::MAX.into()),
            height: request.height.min(u16::MAX.into()),
            ..Default::default()
        };
        let resized = self.shim.agent().await?.task.resize_pty(within(timeouts::QUICK), &guest).await;
        resized.map_err(|error| agent::error("resize", error).into())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        if request.stdin
            && let Some(relay) = process.relay()
        {
            relay.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if matches!(container.init.state(), State::Stopped | State::Deleted) {
            return Err(ServiceError::Update.into());
        }
        if container.is_sandbox_container() {
            return Ok(Empty::new());
        }
        let value = oci::resources_update(&request.resources.value);
        let value = value.map_err(|e| ServiceError::Invalid(crate::chain(&e)))?;
        let resources = Any { type_url: request.resources.type_url.clone(), value, ..Default::default() };
        let guest =
            UpdateTaskRequest { id: container.id.clone(), resources: Some(resources).into(), ..Default::default() };
        let agent = self.shim.agent().await?;
        let change = self.shim.prepare_update(&container.id, &request.resources.value).await?;
        let updated = agent.task.update(within(timeouts::QUICK), &guest).await;
        self.shim.finish_update(&container.id, &change, updated.is_ok()).await;
        updated.map_err(|error| agent::error("update", error).into())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: Some(timestamp(exit.at)).into(), ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.guest_container(&request.id)?;
        let guest = StatsRequest { id: container.id.clone(), ..Default::default() };
        let agent = self.shim.agent().await?;
        let answer = agent.query(|context| agent.task.stats(context, &guest)).await;
        let answer = answer.map_err(|error| agent::error("stats", error))?;
        Ok(checked_stats(answer)?)
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.shim.pid(&request.id),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.shim.shut_down().await;
        Ok(Empty::new())
    }
}

/// Returns only the statistics of the agent's answer. Fails if the statistics have a wrong type or are too large.
pub(crate) fn checked_stats(answer: StatsResponse) -> Result<StatsResponse, ServiceError> {
    let stats = answer
        .stats
        .into_option()
        .filter(|any| any.type_url == metrics::TYPE_URL && any.value.len() <= MAX_METRICS)
        .map(|any| Any { type_url: any.type_url, value: any.value, ..Default::default() });
    let stats = stats.ok_or_else(|| {
        let text = "failed to get the container's statistics: the agent's answer has a wrong type or is too large";
        ServiceError::failed(text.to_owned())
    })?;
    Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
}
