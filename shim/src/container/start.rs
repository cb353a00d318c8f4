//! Handles Start and Exec: starts containers and execs.

use std::time::SystemTime;

use husk_base::failpoint;
use husk_proto::containerd::api::{DeleteRequest, ExecProcessRequest, KillRequest, StartRequest, WaitRequest};
use husk_proto::containerd::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use husk_proto::containerd::topics::{
    TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
};
use protobuf::well_known_types::any::Any;

use crate::container::containers::{Container, Exec};
use crate::container::process::{Exit, Process, State};
use crate::container::streams::ConnectedStdio;
use crate::container::{EXIT_STATUS_KILLED, Shim, stdio_paths};
use crate::error::ServiceError;
use crate::oci;
use crate::stdio::{LoggerContext, Stdio};
use crate::vm::agent;
use crate::vm::agent::{Agent, timeouts, within};

/// Exit status of a process that could not be started, as in runc's shim.
const EXIT_STATUS_NOT_STARTED: u32 = 255;

impl Shim {
    /// Starts a container's init process.
    pub(crate) async fn start_init(&self, container: &Container) -> Result<(), ServiceError> {
        let process = &container.init;
        let agent = self.agent().await?;
        // A CNI plugin may configure the pod's network after the creation of the sandbox. Therefore, before the start
        // of the first container, wait until the guest has the network configuration.
        if container.is_sandbox_container() || self.containers.is_only(&container.id) {
            self.sandbox.settle_network().await.map_err(ServiceError::failed)?;
        }
        self.sandbox.wait_for_propagation().await;
        self.check_not_ending()?;
        failpoint!(async "shim.start").map_err(ServiceError::failed)?;
        process.begin_start()?;
        let request = StartRequest { id: container.id.clone(), ..Default::default() };
        if !container.is_sandbox_container()
            && let Err(error) = agent.task.start(within(timeouts::SLOW), &request).await
        {
            process.start_failed(Exit { status: EXIT_STATUS_NOT_STARTED, at: SystemTime::now() });
            let kill = KillRequest { id: container.id.clone(), signal: 9, all: true, ..Default::default() };
            let _ = agent.task.kill(within(timeouts::QUICK), &kill).await;
            return Err(agent::error("start", error));
        }
        // Nothing can fail any more after the agent has started the process.
        let _ = failpoint!(async "shim.start.answered");
        self.sandbox.timeline.mark("started");
        self.sandbox.timeline.save();
        let event =
            TaskStart { container_id: container.id.clone(), pid: self.pid(&container.id), ..Default::default() };
        self.events.publish(TASK_START_EVENT_TOPIC, &event);
        self.publish_early_exit(container, process);
        self.run_late_hooks("poststart", container, "running").await;
        Ok(())
    }

    /// Adds an exec. The agent gets the exec only when a Start request arrives. Therefore, an error
    /// that only the agent finds, such as a missing program, makes the Start request fail. runc's shim does the same.
    pub(crate) fn add_exec(&self, container: &Container, request: &ExecProcessRequest) -> Result<(), ServiceError> {
        if !crate::ids::is_name(&request.exec_id) {
            return Err(ServiceError::Invalid(format!("exec id {:?}", request.exec_id)));
        }
        if container.is_sandbox_container() {
            return Err(ServiceError::Sandbox);
        }
        if container.is_paused() {
            return Err(ServiceError::Exec("paused"));
        }
        if matches!(container.init.state(), State::Stopped | State::Deleted) || self.sandbox.is_dead() {
            return Err(ServiceError::Exec("stopped"));
        }
        let (spec, profile) =
            oci::exec_process(&request.spec.value).map_err(|e| ServiceError::Invalid(crate::chain(&e)))?;
        let io = stdio_paths(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        let process = Process::new(&container.id, &request.exec_id, io).into();
        container.add_exec(Exec { process, spec, profile, type_url: request.spec.type_url.clone() })?;
        let event = TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        self.events.publish(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Starts an exec.
    pub(crate) async fn start_exec(&self, container: &Container, exec: &Exec) -> Result<(), ServiceError> {
        let process = &exec.process;
        if container.is_paused() {
            return Err(ServiceError::Exec("paused"));
        }
        self.check_not_ending()?;
        process.begin_start()?;
        if let Err(error) = self.start_exec_in_guest(container, exec).await {
            let status = if process.is_start_killed() { EXIT_STATUS_KILLED } else { EXIT_STATUS_NOT_STARTED };
            process.start_failed(Exit { status, at: SystemTime::now() });
            process.drop_relay();
            return Err(error);
        }
        let event = TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: process.exec.clone(),
            pid: self.pid(&container.id),
            ..Default::default()
        };
        self.events.publish(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        self.publish_early_exit(container, process);
        Ok(())
    }

    async fn start_exec_in_guest(&self, container: &Container, exec: &Exec) -> Result<(), ServiceError> {
        let process = &exec.process;
        let agent = self.agent().await?;
        let logger = LoggerContext { id: &process.container, namespace: &self.namespace, launcher: &self.launcher };
        self.load_profile(&agent, &exec.profile).await?;
        self.sandbox.wait_for_propagation().await;
        let connect = async {
            let stdio = Stdio::open(&process.paths, &logger).await.map_err(ServiceError::failed)?;
            self.connect_stdio(stdio).await
        };
        let ConnectedStdio { relay, tokens, turn } = tokio::select! {
            connected = connect => connected?,
            _ = container.init.wait() => return Err(ServiceError::Exec("stopped")),
            () = process.wait_start_killed() => return Err(ServiceError::KilledAtStart),
        };
        failpoint!(async "shim.exec.connected").map_err(ServiceError::failed)?;
        process.set_relay(relay);
        let spec = Any { type_url: exec.type_url.clone(), value: exec.spec.clone(), ..Default::default() };
        let request = ExecProcessRequest {
            id: process.container.clone(),
            exec_id: process.exec.clone(),
            terminal: process.paths.terminal,
            stdin: tokens.stdin,
            stdout: tokens.stdout,
            stderr: tokens.stderr,
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.check_not_ending()?;
        // The agent does not know the exec yet, and has refused the client's Kill request.
        if process.is_start_killed() {
            return Err(ServiceError::KilledAtStart);
        }
        if let Err(error) = agent.task.exec(within(timeouts::SLOW), &request).await {
            if agent::is_timeout(&error) {
                self.forget_exec(&agent, process).await;
            }
            return Err(agent::error("exec", error));
        }
        drop(turn);
        if process.is_start_killed() {
            self.forget_exec(&agent, process).await;
            return Err(ServiceError::KilledAtStart);
        }
        let start = StartRequest { id: process.container.clone(), exec_id: process.exec.clone(), ..Default::default() };
        if let Err(error) = agent.task.start(within(timeouts::SLOW), &start).await {
            self.forget_exec(&agent, process).await;
            return Err(agent::error("exec", error));
        }
        Ok(())
    }

    /// Ends and removes an exec whose start has failed. The agent may still start it after a timeout. The client has
    /// then been told that the exec does not run, and may run it a second time.
    async fn forget_exec(&self, agent: &Agent, process: &Process) {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let kill = KillRequest { id: id.clone(), exec_id: exec_id.clone(), signal: 9, ..Default::default() };
        if agent.task.kill(within(timeouts::QUICK), &kill).await.is_ok() {
            // The agent does not delete a process that has not exited.
            let wait = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
            let _ = agent.task.wait(within(timeouts::QUICK), &wait).await;
        }
        let delete = DeleteRequest { id, exec_id, ..Default::default() };
        let _ = agent.task.delete(within(timeouts::QUICK), &delete).await;
    }

    /// Publishes an exit that was recorded before the start event. If the VM has ended, marks each process of the
    /// container as killed, unless the process has exited.
    fn publish_early_exit(&self, container: &Container, process: &Process) {
        if let Some(exit) = process.confirm_start() {
            self.publish_exit(process, exit);
        }
        if self.vm_has_ended() {
            self.mark_all_killed(container);
        }
    }
}
