//! Handles Kill and Delete: signals processes, and removes containers and execs.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use husk_proto::containerd::api::{DeleteRequest, DeleteResponse, KillRequest};
use husk_proto::containerd::events::task::TaskDelete;
use husk_proto::containerd::topics::TASK_DELETE_EVENT_TOPIC;

use crate::container::containers::{Container, Exec};
use crate::container::process::{Exit, Process, State};
use crate::container::{EXIT_STATUS_KILLED, Shim};
use crate::error::ServiceError;
use crate::events::timestamp;
use crate::vm::agent;
use crate::vm::agent::{timeouts, within};

/// After a container's exit, the shim copies the remaining output. If the shim copies no byte for this duration, the
/// output counts as complete.
///
/// All processes of the container have ended. Therefore, only a client that does not read the output can delay the
/// copying.
const INIT_OUTPUT_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The counterpart of [`INIT_OUTPUT_IDLE_TIMEOUT`] for an exec. This timeout is shorter, because a child of the exec
/// can hold the exec's stdout open forever. runc's shim also waits 2 s.
const EXEC_OUTPUT_IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Time within which the agent must report the exit of an init process after SIGKILL. A process exits later only if it
/// waits for I/O that the host does not complete. Only an agent that is hostile or broken never reports the exit.
const SIGKILL_TIMEOUT: Duration = Duration::from_secs(60);
/// Why the VM ended, if the agent did not report an exit within [`SIGKILL_TIMEOUT`].
const OUTLIVED_SIGKILL: &str = "the agent reported no exit of a container within 60 s after SIGKILL";

impl Shim {
    /// Kills the VM if the agent does not report the exit of `process` in time after SIGKILL. Otherwise, a hostile agent
    /// could keep the pod on the node forever, because containerd removes no pod whose containers run.
    fn watch_sigkill(&self, process: &Arc<Process>) {
        if !process.begin_sigkill() {
            return;
        }
        let (process, sandbox) = (Arc::clone(process), Arc::clone(&self.sandbox));
        tokio::spawn(async move {
            if tokio::time::timeout(SIGKILL_TIMEOUT, process.wait()).await.is_err() {
                tracing::warn!(container = process.container, "killing the VM, because {OUTLIVED_SIGKILL}");
                sandbox.kill_because(OUTLIVED_SIGKILL);
            }
        });
    }

    /// Sends a signal to a process.
    pub(crate) async fn kill(&self, container: &Container, request: &KillRequest) -> Result<(), ServiceError> {
        if request.signal > 64 {
            return Err(ServiceError::Invalid(format!("signal {}", request.signal)));
        }
        let process = container.process(&request.exec_id)?;
        // A Kill request for a finished exec must not kill the children that have outlived the exec. containerd sends a
        // Kill request after every exec's exit (1.7 and 2.1, WithProcessKill in process.go). containerd sends an
        // identical request if an exec exceeds its timeout. The shim distinguishes the two requests by the exec's
        // state.
        match process.state() {
            State::Stopped | State::Deleted => return Err(ServiceError::Finished),
            State::Created if !process.exec.is_empty() => return Err(ServiceError::NotStarted),
            _ => {}
        }
        if container.is_sandbox_container() {
            self.kill_sandbox_container(container, request).await;
            return Ok(());
        }
        let Ok(agent) = self.agent().await else { return Err(ServiceError::Finished) };
        if request.signal == libc::SIGKILL.unsigned_abs() && process.exec.is_empty() {
            self.watch_sigkill(&process);
        }
        let guest = KillRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            signal: request.signal,
            all: request.all,
            ..Default::default()
        };
        match agent.task.kill(within(timeouts::QUICK), &guest).await {
            Ok(_) => Ok(()),
            // The process exited before the signal arrived, by itself or because the VM ended.
            Err(_) if self.sandbox.is_dead() || process.exit().is_some() => Err(ServiceError::Finished),
            Err(error) => Err(agent::error("kill", error)),
        }
    }

    /// Deletes a container.
    pub(crate) async fn delete_container(&self, container: &Container) -> Result<DeleteResponse, ServiceError> {
        let process = &container.init;
        let before = process.begin_delete(ServiceError::NoContainer)?;
        if before == State::Stopped
            && let Some(relay) = process.relay()
        {
            relay.drain(INIT_OUTPUT_IDLE_TIMEOUT).await;
        }
        // The shim ends the VM when the sandbox container is deleted. The shim also ends the VM when the last container
        // is deleted, unless a CreateSandbox request created the sandbox. In both cases, the guest needs no cleanup.
        if container.is_sandbox_container()
            || (self.containers.is_only(&container.id) && !self.sandbox_state.is_created())
        {
            self.sandbox.end().await;
        } else if let Ok(agent) = self.agent().await {
            let request = DeleteRequest { id: container.id.clone(), ..Default::default() };
            match agent.task.delete(within(timeouts::SLOW), &request).await {
                Ok(_) => {}
                Err(_) if self.sandbox.is_dead() => {}
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
                Err(error) => {
                    process.delete_failed(before);
                    return Err(agent::error("delete", error));
                }
            }
        }
        for process in container.processes() {
            process.drop_relay();
        }
        self.tear_down_bundle(&container.id).await;
        let exit = process.exit().unwrap_or_else(|| Exit { status: EXIT_STATUS_KILLED, at: SystemTime::now() });
        self.containers.remove(&container.id);
        self.release_resources(&container.id);
        self.sandbox.timeline.mark("deleted");
        let event = TaskDelete {
            container_id: container.id.clone(),
            pid: self.pid(&container.id),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(TASK_DELETE_EVENT_TOPIC, &event);
        self.run_late_hooks("poststop", container, "stopped").await;
        let deleted = self.publish_deleted(process, exit);
        self.release_pid(&container.id).await;
        Ok(deleted)
    }

    /// Deletes an exec.
    pub(crate) async fn delete_exec(&self, container: &Container, exec: &Exec) -> Result<DeleteResponse, ServiceError> {
        let process = &exec.process;
        let before = process.begin_delete(ServiceError::NoProcess(process.exec.clone()))?;
        let exit = process.exit().unwrap_or_else(|| Exit { status: 0, at: SystemTime::now() });
        if before == State::Stopped {
            if let Some(relay) = process.relay() {
                relay.drain(EXEC_OUTPUT_IDLE_TIMEOUT).await;
            }
            if let Ok(agent) = self.agent().await {
                let request =
                    DeleteRequest { id: container.id.clone(), exec_id: process.exec.clone(), ..Default::default() };
                // Only log a failure, because the agent does not know an exec whose start has failed.
                if let Err(error) = agent.task.delete(within(timeouts::QUICK), &request).await {
                    tracing::debug!(container = container.id, exec = process.exec, %error, "failed to delete the exec");
                }
            }
        }
        process.drop_relay();
        container.remove_exec(&process.exec);
        Ok(self.publish_deleted(process, exit))
    }

    fn publish_deleted(&self, process: &Process, exit: Exit) -> DeleteResponse {
        tracing::debug!(container = process.container, exec = process.exec, status = exit.status, "deleted a process");
        DeleteResponse {
            pid: self.pid(&process.container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }
    }
}
