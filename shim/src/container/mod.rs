//! Implements the operations of containerd's Task and Sandbox services for one sandbox and its containers.

pub mod containers;
mod create;
mod delete;
pub mod escalation;
#[cfg(test)]
mod exec_kill_tests;
pub mod exit_progress;
#[cfg(test)]
mod hung_guest_tests;
#[cfg(test)]
mod model_tests;
mod oom_score;
mod orderly_end;
#[cfg(test)]
mod orderly_end_tests;
mod pids;
mod prepare;
#[cfg(test)]
mod prepare_tests;
pub mod process;
mod resize;
mod sandbox_container;
pub mod sandbox_state;
#[cfg(test)]
mod slow_guest_tests;
mod start;
mod streams;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use husk_proto::containerd::events::task::{TaskExit, TaskOOM};
use husk_proto::containerd::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use tokio::sync::{mpsc, watch};

use crate::container::containers::{Container, Containers};
use crate::container::orderly_end::OrderlyEnd;
use crate::container::process::{Exit, ExitReport, Process, State};
use crate::error::ServiceError;
use crate::events::{Events, timestamp};
use crate::launcher::Launcher;
use crate::resources::oom_score::Scores;
use crate::sandbox::Sandbox;
use crate::sandbox::disks::DISK_FLUSH_TIMEOUT;
use crate::sandbox::launch::DeferredLaunch;
use crate::stdio::Paths;
use crate::vm::agent::{Agent, Report};
use crate::volumes::mirror::Watchers;

/// Exit status of a process that had not exited when the VM ended: the status after SIGKILL.
pub(crate) const EXIT_STATUS_KILLED: u32 = 128 + 9;

/// The shim's state: one sandbox and its containers.
pub struct Shim {
    pub(crate) namespace: String,
    pub(crate) sandbox: Arc<Sandbox>,
    /// State for the requests of containerd's Sandbox service.
    pub(crate) sandbox_state: sandbox_state::SandboxState,
    pub(crate) containers: Containers,
    pub(crate) limits: resize::ResourceLimits,
    pub(crate) pids: pids::Pids,
    pub(crate) oom_scores: Scores,
    pub(crate) stream_turns: streams::StreamTurns,
    pub(crate) events: Events,
    /// Watches the mirrored volumes.
    pub(crate) watchers: Watchers,
    pub(crate) launcher: Launcher,
    /// Whether the VM has ended and the shim has handled all reports from the agent. If true, all processes count as
    /// exited.
    pub(crate) vm_ended: watch::Sender<bool>,
    pub(crate) finishing: AtomicBool,
    /// Whether a Shutdown request arrived while the last containers were being deleted or created.
    shutdown_waits: AtomicBool,
    orderly_end: watch::Sender<OrderlyEnd>,
    pub(crate) finished: watch::Sender<bool>,
}

impl Shim {
    /// Returns the shim's state, and spawns a task that handles `reports` from the agent.
    ///
    /// `pending` is the input for a launch that waits for a CreateSandbox request. `pending` is `None` if the launch
    /// needs no such request.
    pub fn new(
        namespace: &str,
        sandbox: Arc<Sandbox>,
        events: Events,
        launcher: Launcher,
        reports: mpsc::Receiver<Report>,
        pending: Option<DeferredLaunch>,
    ) -> Arc<Self> {
        let shim = Arc::new(Self {
            namespace: namespace.to_owned(),
            sandbox,
            sandbox_state: sandbox_state::SandboxState::new(pending),
            containers: Containers::default(),
            limits: resize::ResourceLimits::default(),
            pids: pids::Pids::default(),
            oom_scores: Scores::default(),
            stream_turns: streams::StreamTurns::default(),
            events,
            watchers: Watchers::default(),
            launcher,
            vm_ended: watch::Sender::new(false),
            finishing: AtomicBool::new(false),
            shutdown_waits: AtomicBool::new(false),
            orderly_end: watch::Sender::new(OrderlyEnd::NotBegun),
            finished: watch::Sender::new(false),
        });
        tokio::spawn(Arc::clone(&shim).handle_reports(reports));
        shim
    }

    /// Waits until [`Shim::finish`] has torn the sandbox down.
    pub async fn wait_finished(&self) {
        let _ = self.finished.subscribe().wait_for(|done| *done).await;
    }

    /// Waits until the VMM process reports that it has received SIGTERM or SIGINT.
    pub async fn vmm_terminated(&self) {
        self.sandbox.terminated().await;
    }

    /// Checks that the pod may start a process.
    ///
    /// # Errors
    /// [`ServiceError::Ending`] if the shim ends the pod because of a signal.
    pub(crate) fn check_not_ending(&self) -> Result<(), ServiceError> {
        if *self.orderly_end.borrow() == OrderlyEnd::NotBegun { Ok(()) } else { Err(ServiceError::Ending) }
    }

    /// Returns the event queue.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Tears the sandbox down, after the orderly end if that is in progress. Only the first call starts the teardown,
    /// but every call waits until the teardown is complete.
    pub async fn finish(self: &Arc<Self>) {
        if !self.finishing.swap(true, Ordering::Relaxed) {
            // Use a separate task, because the caller's future may be dropped.
            let shim = Arc::clone(self);
            tokio::spawn(async move {
                shim.wait_orderly_end().await;
                shim.sandbox_state.wait_launch().await;
                shim.sandbox.tear_down().await;
                shim.finished.send_replace(true);
            });
        }
        self.wait_finished().await;
    }

    /// Tears the sandbox down because of a request. While the pod ends in an orderly way, and during a launch, the
    /// request waits at most for `limit`.
    pub(crate) async fn finish_by_request(self: &Arc<Self>, limit: Duration) {
        if self.is_ending() || self.sandbox_state.is_launching() {
            let _ = tokio::time::timeout(limit, self.finish()).await;
        } else {
            self.finish().await;
        }
    }

    /// Handles Shutdown, which ends the shim if the pod has no containers.
    pub(crate) async fn shut_down(self: &Arc<Self>) {
        // containerd 1.7 sends this request after the deletion of each task of a pod. A creation of another container
        // must then continue.
        if self.containers.all().is_empty() {
            self.cancel_all_creations().await;
        }
        // If containerd created the sandbox through the Sandbox API, only ShutdownSandbox ends the shim.
        if self.sandbox_state.is_created() {
            return;
        }
        if self.containers.is_empty() {
            self.finish_by_request(self.sandbox.timeout(DISK_FLUSH_TIMEOUT)).await;
        } else if self.containers.all().iter().all(|container| container.init.state() == State::Deleted) {
            self.shutdown_waits.store(true, Ordering::Relaxed);
        }
    }

    /// Ends the shim after the deletion of the last container, or the end of the last creation, if Shutdown arrived
    /// meanwhile. containerd sends Shutdown only once.
    pub(crate) fn shut_down_if_waiting(self: &Arc<Self>) {
        if self.shutdown_waits.load(Ordering::Relaxed) && self.containers.is_empty() {
            let shim = Arc::clone(self);
            tokio::spawn(async move { shim.finish().await });
        }
    }

    /// Waits for a VMM process that does not exit although it was killed.
    pub async fn wait_for_stuck_vmm(&self) {
        self.sandbox.wait_for_stuck_vmm().await;
    }

    /// Records the exits that the agent reports, and publishes the events for containerd. When the VM has ended, marks
    /// each process as killed, unless the process has exited.
    async fn handle_reports(self: Arc<Self>, mut reports: mpsc::Receiver<Report>) {
        while let Some(report) = reports.recv().await {
            match report {
                Report::Oom { container } => match self.containers.get(&container) {
                    Ok(container) => self.publish_oom(&container),
                    Err(_) => tracing::warn!(container, "the agent reported an OOM kill in an unknown container"),
                },
                Report::HostSocket(request) => self.sandbox.connect_host_socket(request, &self.launcher),
                Report::Exit { container, exec, status, at, oom } => {
                    let Ok(container) = self.containers.get(&container) else {
                        tracing::warn!(container, exec, status, "the agent reported an exit in an unknown container");
                        continue;
                    };
                    let Ok(process) = container.process(&exec) else {
                        tracing::warn!(
                            container = container.id,
                            exec,
                            "the agent reported the exit of an unknown exec"
                        );
                        continue;
                    };
                    if oom {
                        self.publish_oom(&container);
                    }
                    let exit = Exit { status, at };
                    if process.record_exit(exit) == ExitReport::Publish {
                        self.publish_exit(&process, exit);
                    }
                }
            }
        }
        // Other tasks mark containers that are added from here on.
        self.vm_ended.send_replace(true);
        for container in self.containers.all() {
            if self.sandbox.is_oom_killed() && container.init.state() == process::State::Running {
                self.publish_oom(&container);
            }
            self.mark_all_killed(&container);
        }
        self.sandbox_state.record_end();
        if self.sandbox.has_vmm_process() {
            self.end_stuck_outputs().await;
        }
    }

    /// Marks each process of a container as killed, unless the process has exited. Called when the VM has ended.
    pub(crate) fn mark_all_killed(&self, container: &Container) {
        let exit = Exit { status: EXIT_STATUS_KILLED, at: SystemTime::now() };
        for process in container.processes() {
            let started = process.exec.is_empty() || process.state() != process::State::Created;
            if process.record_exit(exit) == ExitReport::Publish && started {
                self.publish_exit(&process, exit);
            }
        }
    }

    pub(crate) fn vm_has_ended(&self) -> bool {
        *self.vm_ended.borrow()
    }

    pub(crate) fn publish_oom(&self, container: &Container) {
        if container.claim_oom_report() {
            tracing::info!(container = container.id, "the container ran out of memory");
            let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
            self.events.publish(TASK_OOM_EVENT_TOPIC, &event);
        }
    }

    pub(crate) fn publish_exit(&self, process: &Process, exit: Exit) {
        if process.exec.is_empty() {
            self.sandbox.timeline.mark("exited");
        }
        tracing::debug!(container = process.container, exec = process.exec, status = exit.status, "a process exited");
        let event = TaskExit {
            container_id: process.container.clone(),
            id: process.event_id().to_owned(),
            pid: self.pid(&process.container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// Returns the agent.
    ///
    /// # Errors
    /// [`ServiceError::Gone`] if the VM has ended. [`ServiceError::NotReady`] if the agent is not ready.
    pub(crate) async fn agent(&self) -> Result<Agent, ServiceError> {
        if let Some(reason) = self.sandbox.end_reason().await {
            return Err(ServiceError::Gone(reason));
        }
        self.sandbox.agent().ok_or(ServiceError::NotReady)
    }
}

pub(crate) fn stdio_paths(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Paths {
    Paths { stdin: stdin.to_owned(), stdout: stdout.to_owned(), stderr: stderr.to_owned(), terminal }
}
