//! Kill and Delete: what runs ends, and nothing of it stays.

use std::time::{Duration, SystemTime};

use husk_proto::containerd::api::{DeleteRequest, DeleteResponse, KillRequest};
use husk_proto::containerd::events::task::TaskDelete;
use husk_proto::containerd::topics::TASK_DELETE_EVENT_TOPIC;

use super::container::{Container, Exec};
use super::process::{Exit, Process, State};
use super::{KILLED, Refusal, Shim};
use crate::events::timestamp;
use crate::sandbox::agent::{timeouts, within};

/// How long a container's output may stand still before it counts as complete: its processes are gone, so only a
/// reader that does not read holds it up.
const QUIET_INIT: Duration = Duration::from_secs(10);
/// The same for an exec, whose stdout a process it left behind may hold open for ever. runc's shim waits as long.
const QUIET_EXEC: Duration = Duration::from_secs(2);

impl Shim {
    /// Signals a process.
    pub(super) async fn kill(&self, container: &Container, request: &KillRequest) -> ttrpc::Result<()> {
        if request.signal > 64 {
            return Err(Refusal::Invalid(format!("signal {}", request.signal)).into());
        }
        let process = container.process(&request.exec_id)?;
        // What an exec that ended by itself has left behind may stay: containerd kills every exec once more when it is done
        // with it, and an exec that ran too long just the same (1.7 and 2.1, WithProcessKill in process.go).
        match process.state() {
            State::Stopped | State::Deleted => return Err(Refusal::Finished.into()),
            State::Created if !process.exec.is_empty() => return Err(Refusal::NotStarted.into()),
            _ => {}
        }
        if container.is_pause() {
            self.kill_pause(container, request).await;
            return Ok(());
        }
        let Ok(agent) = self.agent() else { return Err(Refusal::Finished.into()) };
        let guest = KillRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            signal: request.signal,
            all: request.all,
            ..Default::default()
        };
        match agent.task.kill(within(timeouts::QUICK), &guest).await {
            Ok(_) => Ok(()),
            // It ended, with its machine or without, before the signal came.
            Err(_) if self.sandbox.is_dead() || process.exited().is_some() => Err(Refusal::Finished.into()),
            Err(error) => Err(self.agent_error("kill", error)),
        }
    }

    /// Deletes a container.
    pub(super) async fn delete_container(&self, container: &Container) -> ttrpc::Result<DeleteResponse> {
        let process = &container.init;
        let before = process.begin_delete(Refusal::NoContainer)?;
        if before == State::Stopped
            && let Some(relay) = process.relay()
        {
            relay.drain(QUIET_INIT).await;
        }
        // The last container takes the virtual machine with it where nothing else stands for the sandbox, and so does the
        // one that stands for the pod: no need to tidy up in there first.
        if container.is_pause() || (self.containers.is_only(&container.id) && !self.api.is_created()) {
            self.sandbox.end().await;
        } else if let Ok(agent) = self.agent() {
            let request = DeleteRequest { id: container.id.clone(), ..Default::default() };
            match agent.task.delete(within(timeouts::SLOW), &request).await {
                Ok(_) => {}
                Err(_) if self.sandbox.is_dead() => {}
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
                Err(error) => {
                    process.delete_failed(before);
                    return Err(self.agent_error("delete", error));
                }
            }
        }
        for process in container.processes() {
            process.drop_relay();
        }
        self.tear_down_bundle(&container.id).await;
        let exit = process.exited().unwrap_or(Exit { status: KILLED, at: SystemTime::now() });
        self.containers.remove(&container.id);
        self.take_room(&container.id);
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
        let deleted = self.deleted(process, exit);
        self.give_back_pid(&container.id).await;
        Ok(deleted)
    }

    /// Deletes an exec.
    pub(super) async fn delete_exec(&self, container: &Container, exec: &Exec) -> ttrpc::Result<DeleteResponse> {
        let process = &exec.process;
        let before = process.begin_delete(Refusal::NoProcess(process.exec.clone()))?;
        let exit = process.exited().unwrap_or(Exit { status: 0, at: SystemTime::now() });
        if before == State::Stopped {
            if let Some(relay) = process.relay() {
                relay.drain(QUIET_EXEC).await;
            }
            if let Ok(agent) = self.agent() {
                let request =
                    DeleteRequest { id: container.id.clone(), exec_id: process.exec.clone(), ..Default::default() };
                // The agent may have forgotten it with a failed start; nothing depends on its answer.
                if let Err(error) = agent.task.delete(within(timeouts::QUICK), &request).await {
                    tracing::debug!(container = container.id, exec = process.exec, %error, "exec not deleted");
                }
            }
        }
        process.drop_relay();
        container.remove_exec(&process.exec);
        Ok(self.deleted(process, exit))
    }

    fn deleted(&self, process: &Process, exit: Exit) -> DeleteResponse {
        tracing::debug!(container = process.container, exec = process.exec, status = exit.status, "deleted");
        DeleteResponse {
            pid: self.pid(&process.container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }
    }
}
