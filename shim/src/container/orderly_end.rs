//! Ends the pod in an orderly way after SIGTERM or SIGINT to the shim or to the VMM, for example when the node shuts
//! down.
//!
//! The containers get their stop signals, and after a grace period SIGKILL. Then the guest writes its dirty pages to
//! the disks, and the shim ends the VM. Each step has a limit, so that a guest that hangs cannot delay the node's
//! shutdown.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use husk_proto::containerd::api::{KillRequest, ResumeRequest};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::container::Shim;
use crate::container::containers::Container;
use crate::container::escalation::SIGNAL_TIMEOUT;
use crate::container::process::{Exit, ExitReport, State};
use crate::vm::agent::within;

/// How long all containers together may take to exit after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest may take to write its dirty pages to slow disks. This is longer than in a request that ends a
/// pod, because no client waits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last output of all containers together may take.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the shim serves requests after the end. containerd deletes the containers when it gets their exits, and
/// then sends Shutdown. If the shim ended before, containerd would record the status 137 for each container.
pub(super) const LAST_REQUESTS_TIMEOUT: Duration = Duration::from_secs(5);
/// The reason of the VM's end.
const REASON: &str = "the shim or the VMM received SIGTERM or SIGINT, and the shim has ended the pod";

/// Progress of the pod's orderly end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OrderlyEnd {
    /// No signal has arrived.
    NotBegun,
    /// The shim ends the pod because of a signal. No further process is started, and no request kills the VM.
    InProgress,
    /// The shim has killed the VM.
    Done,
}

impl Shim {
    /// Returns whether the pod is ending in an orderly way.
    pub(crate) fn is_ending(&self) -> bool {
        *self.orderly_end.borrow() == OrderlyEnd::InProgress
    }

    /// Waits while the pod ends in an orderly way.
    pub(crate) async fn wait_orderly_end(&self) {
        let _ = self.orderly_end.subscribe().wait_for(|end| *end != OrderlyEnd::InProgress).await;
    }

    /// Ends the containers, flushes the guest's disks and ends the VM. From the start of this call, the shim starts no
    /// further process.
    pub async fn end_orderly(self: &Arc<Self>) {
        self.orderly_end.send_replace(OrderlyEnd::InProgress);
        let grace = self.sandbox.shutdown_grace();
        let cancelled = timeout(grace, self.cancel_all_creations());
        let (_, stopped) = tokio::join!(cancelled, self.for_each_running(grace, Self::stop_container));
        if !stopped {
            self.for_each_running(KILL_TIMEOUT, Self::kill_container).await;
        }
        self.drain_output().await;
        // The mounts of a container end with its last process. Therefore the flush also covers their last writes. If an
        // unmount is still in progress, sync(2) in the guest waits for it.
        self.sandbox.flush_disks_within(FLUSH_TIMEOUT).await;
        self.record_end_of_sandbox();
        self.sandbox.kill_because(REASON.into());
        self.orderly_end.send_replace(OrderlyEnd::Done);
    }

    /// Waits until containerd has deleted the containers and sent Shutdown, at most for [`LAST_REQUESTS_TIMEOUT`].
    pub async fn wait_last_requests(&self) {
        if timeout(LAST_REQUESTS_TIMEOUT, self.wait_finished()).await.is_err() {
            tracing::warn!("containerd has not deleted all containers of the pod, whose exits it got");
        }
    }

    /// Runs `act` for each container that has a process in the guest, and waits until these containers have exited, at
    /// most for `limit`. Returns whether all have exited.
    async fn for_each_running<F: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        limit: Duration,
        act: fn(Arc<Self>, Arc<Container>) -> F,
    ) -> bool {
        let mut exits = JoinSet::new();
        for container in self.containers.all() {
            let running = matches!(container.init.state(), State::Starting | State::Running);
            if running && !container.is_sandbox_container() {
                let acted = act(Arc::clone(self), Arc::clone(&container));
                exits.spawn(async move { tokio::join!(acted, container.init.wait()) });
            }
        }
        // After the timeout, the drop of `exits` ends the tasks.
        timeout(limit, exits.join_all()).await.is_ok()
    }

    async fn stop_container(self: Arc<Self>, container: Arc<Container>) {
        // Before its start, the program has no handler for the signal. The kernel then drops the signal, because the
        // program is the first process of a PID namespace (pid_namespaces(7)).
        container.init.wait_start().await;
        if container.is_paused()
            && let Some(agent) = self.sandbox.agent()
        {
            // A process that is frozen handles no signal.
            let request = ResumeRequest { id: container.id.clone(), ..Default::default() };
            if agent.task.resume(within(self.sandbox.timeout(SIGNAL_TIMEOUT)), &request).await.is_ok() {
                container.set_paused(false);
            }
        }
        let signal = container.spec.annotations.stop_signal();
        self.signal(&container, signal, false).await;
    }

    async fn kill_container(self: Arc<Self>, container: Arc<Container>) {
        tracing::warn!(container = container.id, "the container did not exit in time after its stop signal");
        self.signal(&container, libc::SIGKILL.unsigned_abs(), true).await;
    }

    async fn signal(self: &Arc<Self>, container: &Arc<Container>, signal: u32, all: bool) {
        let request = KillRequest { id: container.id.clone(), signal, all, ..Default::default() };
        if let Err(error) = self.kill(container, &request).await {
            let error = crate::chain(&error);
            tracing::debug!(container = container.id, signal, error, "failed to signal the container");
        }
    }

    /// Waits until the containers' output is copied.
    async fn drain_output(&self) {
        let mut relays = JoinSet::new();
        for process in self.containers.all().iter().flat_map(|container| container.processes()) {
            if let Some(relay) = process.relay().filter(|_| process.exit().is_some()) {
                relays.spawn(async move { relay.drain(OUTPUT_TIMEOUT, OUTPUT_TIMEOUT).await });
            }
        }
        relays.join_all().await;
    }

    /// Records the exit of the sandbox container, or of the sandbox, with the status that the pause program has after
    /// SIGTERM.
    fn record_end_of_sandbox(&self) {
        self.sandbox_state.begin_stop();
        for container in self.containers.all().iter().filter(|container| container.is_sandbox_container()) {
            let exit = Exit { status: 0, at: SystemTime::now() };
            if container.init.record_exit(exit) == ExitReport::Publish {
                self.publish_exit(&container.init, exit);
            }
        }
    }
}
