//! Handles Kill and Delete: signals processes, and removes containers and execs.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use husk_base::failpoint;
use husk_config::BaseTimeout;
use husk_proto::containerd::api::{DeleteRequest, DeleteResponse, KillRequest};
use husk_proto::containerd::events::task::TaskDelete;
use husk_proto::containerd::topics::TASK_DELETE_EVENT_TOPIC;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::container::containers::{Container, Exec};
use crate::container::escalation::{AGENT_DELETE_TIMEOUT, DELETE_TIMEOUT, KILL_ANSWER_TIMEOUT, SIGNAL_TIMEOUT};
use crate::container::process::{Exit, Process, State};
use crate::container::{EXIT_STATUS_KILLED, Shim};
use crate::error::ServiceError;
use crate::events::timestamp;
use crate::vm::agent;
use crate::vm::agent::within;

/// The number of SIGKILL, which ends a process in any state.
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
/// After a container's exit, the shim copies the remaining output. After this duration, the output counts as complete.
///
/// All processes of the container have ended. Therefore, only a client that does not read the output, or reads it
/// slowly, can delay the copying. containerd sends Delete only when it has read the output. The time is short, so that
/// enough of [`DELETE_TIMEOUT`] is left for the agent.
const INIT_OUTPUT_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(1500);
/// If the shim has killed the VMM process, and the process waits in the host's kernel, the process keeps its sockets
/// open. Therefore the output does not end, although no more data arrives. If the shim copies no byte for this
/// duration, the output counts as complete.
const STUCK_OUTPUT_IDLE_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(400);
/// The counterpart of [`STUCK_OUTPUT_IDLE_TIMEOUT`] for an exec, because a child of the exec can hold the exec's stdout
/// open forever. runc's shim also waits 2 s.
const EXEC_OUTPUT_IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// The counterpart of [`INIT_OUTPUT_TIMEOUT`] for an exec. A child of the exec can write output forever.
const EXEC_OUTPUT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for the agent's answer to the request that deletes an exec. The shim then deletes the exec nevertheless.
const EXEC_DELETE_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(2);

/// How long after its arrival a Delete request waits for poststop hooks. The hooks then continue until their own
/// timeouts. A guest that hangs can delay the answer, too, and the deletion must not take longer for the kubelet.
const POSTSTOP_TIMEOUT: Duration = Duration::from_secs(40);

impl Shim {
    /// Sends a signal to a process.
    ///
    /// If the agent does not answer SIGKILL for a container, or the container does not exit, the shim kills the VM. Any
    /// other signal for a guest that does not answer stays in the connection to the agent, as the kernel keeps a signal
    /// for a process that is stopped.
    pub(crate) async fn kill(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: &KillRequest,
    ) -> Result<(), ServiceError> {
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
        let guest = KillRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            signal: request.signal,
            all: request.all,
            ..Default::default()
        };
        failpoint!(async "shim.kill").map_err(ServiceError::failed)?;
        let ends_container = process.exec.is_empty() && request.signal == SIGKILL;
        let limit = self.sandbox.timeout(if ends_container { KILL_ANSWER_TIMEOUT } else { SIGNAL_TIMEOUT });
        if ends_container {
            self.expect_exit(container);
        }
        // The agent refuses a signal for an exec that it does not know yet. Then the start itself fails.
        let ends_start = !process.exec.is_empty() && request.signal == SIGKILL && process.kill_start();
        match agent.task.kill(within(limit), &guest).await {
            Ok(_) => Ok(()),
            Err(error) if agent::is_timeout(&error) && ends_container => {
                self.end_silent_vm(container, "kill", limit).await;
                Ok(())
            }
            Err(error) if agent::is_timeout(&error) => {
                let (signal, exec) = (request.signal, &request.exec_id);
                tracing::warn!(container = container.id, exec, signal, "the agent has not confirmed a signal yet");
                Ok(())
            }
            Err(ttrpc::Error::RpcStatus(status))
                if ends_start && matches!(status.code(), ttrpc::Code::NOT_FOUND | ttrpc::Code::FAILED_PRECONDITION) =>
            {
                Ok(())
            }
            // The process exited before the signal arrived, by itself or because the VM ended.
            Err(error) if process.exit().is_some() || self.vm_has_ended_with(&error).await => {
                Err(ServiceError::Finished)
            }
            Err(error) => match agent::error("kill", error) {
                // A hostile agent can answer with an error. If the container does not exit, the shim kills the VM.
                error if ends_container && error.code() != ttrpc::Code::NOT_FOUND => {
                    let error = crate::chain(&error);
                    tracing::warn!(container = container.id, error, "the agent failed to send SIGKILL");
                    Ok(())
                }
                error => Err(error),
            },
        }
    }

    /// Ends the outputs of all processes, although the VMM process has not exited and keeps its sockets open. Called
    /// when the VM has ended.
    ///
    /// containerd deletes a container only when its outputs have ended (`Delete` in containerd's client/task.go).
    pub(crate) async fn end_stuck_outputs(self: Arc<Self>) {
        let mut draining = JoinSet::new();
        let (idle, total) =
            (self.sandbox.timeout(STUCK_OUTPUT_IDLE_TIMEOUT), self.sandbox.timeout(INIT_OUTPUT_TIMEOUT));
        for process in self.containers.all().iter().flat_map(|container| container.processes()) {
            draining.spawn(async move {
                if let Some(relay) = process.relay() {
                    relay.drain(idle, total).await;
                }
                process.drop_relay();
            });
        }
        draining.join_all().await;
    }

    /// Deletes a container. `begin` is when the request arrived.
    ///
    /// If the agent does not answer, the shim kills the VM.
    pub(crate) async fn delete_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        begin: Instant,
    ) -> Result<DeleteResponse, ServiceError> {
        failpoint!(async "shim.delete").map_err(ServiceError::failed)?;
        let process = &container.init;
        let before = self.begin_delete(container).await?;
        if before == State::Stopped
            && let Some(relay) = process.relay()
        {
            let stuck = self.vm_has_ended() && self.sandbox.has_vmm_process();
            let idle = if stuck { STUCK_OUTPUT_IDLE_TIMEOUT } else { INIT_OUTPUT_TIMEOUT };
            relay.drain(self.sandbox.timeout(idle), self.sandbox.timeout(INIT_OUTPUT_TIMEOUT)).await;
        }
        // The shim ends the VM when the sandbox container is deleted. The shim also ends the VM when the last container
        // is deleted, unless a CreateSandbox request created the sandbox. In both cases, the guest needs no cleanup.
        if container.is_sandbox_container()
            || (self.containers.is_only(&container.id) && !self.sandbox_state.is_created())
        {
            let limit = self.sandbox.timeout(DELETE_TIMEOUT) + self.sandbox.timeout(INIT_OUTPUT_TIMEOUT);
            self.end_vm_by_request(limit.saturating_sub(begin.elapsed())).await;
        } else if let Ok(agent) = self.agent().await {
            let request = DeleteRequest { id: container.id.clone(), ..Default::default() };
            // The time for the output counts. Otherwise the request would take longer than its budget.
            let rest = self.sandbox.timeout(DELETE_TIMEOUT).saturating_sub(begin.elapsed());
            let limit = rest.max(self.sandbox.timeout(AGENT_DELETE_TIMEOUT));
            match agent.task.delete(within(limit), &request).await {
                Ok(_) => {}
                Err(error) if agent::is_timeout(&error) => {
                    self.end_silent_vm(container, "delete", limit).await;
                }
                Err(error) if self.vm_has_ended_with(&error).await => {}
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
                Err(error) if container.claim_delete_failure() => {
                    process.delete_failed(before);
                    return Err(agent::error("delete", error));
                }
                // The request is a retry. The pod must end, even if the agent refuses the retry, too.
                Err(error) => {
                    let error = crate::chain(&agent::error("delete", error));
                    self.end_vm(
                        container,
                        format!("the agent failed twice to delete container {}: {error}", container.id),
                    )
                    .await;
                }
            }
        }
        let killed = Exit { status: EXIT_STATUS_KILLED, at: SystemTime::now() };
        for process in container.processes() {
            process.drop_relay();
            // The agent may not have reported the exit, for example that of an exec that was never started.
            if process.end_with_container(killed) {
                self.publish_exit(&process, killed);
            }
        }
        // The container is gone in the guest. Its removal on the node cannot be undone.
        let _ = failpoint!(async "shim.delete.guest");
        self.tear_down_bundle(&container.id).await;
        let exit = process.exit().unwrap_or(killed);
        let pid = self.pid(&container.id);
        // From here on, the id can be used again.
        self.release_pid(&container.id);
        self.sandbox.dir().forget_container(&container.id);
        self.containers.remove(&container.id);
        self.release_resources(&container.id);
        self.sandbox.timeline.mark("deleted");
        let event = TaskDelete {
            container_id: container.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(TASK_DELETE_EVENT_TOPIC, &event);
        let (shim, stopped) = (Arc::clone(self), Arc::clone(container));
        let hooks = tokio::spawn(async move { shim.run_late_hooks("poststop", &stopped, "stopped").await });
        if tokio::time::timeout_at(begin + POSTSTOP_TIMEOUT, hooks).await.is_err() {
            tracing::warn!(container = container.id, "the poststop hooks continue after the deletion of the container");
        }
        let deleted = Self::deleted(process, exit, pid);
        process.end_delete();
        self.shut_down_if_waiting();
        Ok(deleted)
    }

    /// Begins the deletion of a container. If another request is deleting the container, waits until that request has
    /// ended. The container then does not exist, or the deletion has failed, and this request tries it again.
    ///
    /// containerd repeats a Delete request that has exceeded its timeout. It takes "not found" for a success, and then
    /// forgets the container (`delete` in runtime/v2/shim.go of containerd 1.7). runc's shim holds a lock meanwhile.
    async fn begin_delete(&self, container: &Arc<Container>) -> Result<State, ServiceError> {
        let exists = || self.containers.get(&container.id).is_ok_and(|found| Arc::ptr_eq(&found, container));
        loop {
            match container.init.begin_delete(ServiceError::NoContainer) {
                Err(ServiceError::NoContainer) if exists() => container.init.wait_delete().await,
                result => return result,
            }
        }
    }

    /// Deletes an exec.
    pub(crate) async fn delete_exec(&self, container: &Container, exec: &Exec) -> Result<DeleteResponse, ServiceError> {
        let process = &exec.process;
        let before = process.begin_delete(ServiceError::NoProcess(process.exec.clone()))?;
        let exit = process.exit().unwrap_or_else(|| Exit { status: 0, at: SystemTime::now() });
        if before == State::Stopped {
            if let Some(relay) = process.relay() {
                relay.drain(EXEC_OUTPUT_IDLE_TIMEOUT, EXEC_OUTPUT_TIMEOUT).await;
            }
            if let Ok(agent) = self.agent().await {
                let request =
                    DeleteRequest { id: container.id.clone(), exec_id: process.exec.clone(), ..Default::default() };
                let limit = self.sandbox.timeout(EXEC_DELETE_TIMEOUT);
                // Only log a failure, because the agent does not know an exec whose start has failed.
                if let Err(error) = agent.task.delete(within(limit), &request).await {
                    tracing::debug!(container = container.id, exec = process.exec, %error, "failed to delete the exec");
                }
            }
        }
        process.drop_relay();
        container.remove_exec(&process.exec);
        Ok(Self::deleted(process, exit, self.pid(&container.id)))
    }

    fn deleted(process: &Process, exit: Exit, pid: u32) -> DeleteResponse {
        tracing::debug!(container = process.container, exec = process.exec, status = exit.status, "deleted a process");
        DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }
    }
}
