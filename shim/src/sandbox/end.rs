//! Follows a VM from the end of its boot to its own end, and determines why it has ended.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use husk_config::BaseTimeout;
use tokio::sync::{mpsc, watch};

use crate::blocking;
use crate::resources::cgroup::{CgroupLocation, oom};
use crate::sandbox::ENDED_BY_REQUEST;
use crate::sandbox::notices::{self, Progress};
use crate::text::bounded;
use crate::vm::agent::{self, Agent, Report};
use crate::vm::vmm::{VMM_EXIT_TIMEOUT, Vmm};
use crate::vm::{State, StateCell};

/// How long the agent's last events may take to arrive after the VMM process has exited.
const LAST_EVENTS_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(400);
/// The reason for the VM's end can contain an error of the agent's event stream. Maximum length of this error, in
/// bytes.
const MAX_STREAM_ERROR: usize = 512;

/// The reason of the VM's end if the node's OOM killer has killed the VMM process.
pub const OOM_KILLED: &str = "the node's OOM killer killed the VMM process: the pod needs a higher memory limit or \
                              overhead, or the node has too little memory";

/// What the end of the VM changes.
pub struct End {
    /// The state, which becomes final.
    pub state: StateCell,
    /// Why the shim has killed the VM, if it has.
    pub kill_reason: Arc<OnceLock<Arc<str>>>,
    /// The sandbox's cgroup, if it has one.
    pub cgroup: Option<CgroupLocation>,
    /// Whether the node's OOM killer has killed the VMM process.
    pub oom_killed: Arc<AtomicBool>,
}

impl End {
    /// Forwards the agent's reports until the VM ends, and then records why it has ended. `booted` is the result of the
    /// boot. `vmm` is `None` if the VMM process was not started.
    pub async fn follow(
        &self,
        booted: Result<Agent, String>,
        vmm: Option<Vmm>,
        progress: &mut watch::Receiver<Progress>,
        reports: &mpsc::Sender<Report>,
    ) {
        let lost = match (booted, &vmm) {
            (Ok(agent), Some(vmm)) => Some(forward_events(agent, vmm, &self.state, reports).await),
            (Ok(_), None) => None,
            (Err(error), vmm) => {
                tracing::error!(error, "failed to start the sandbox");
                self.state.enter(State::Failed(error.into()));
                if let Some(vmm) = vmm {
                    vmm.kill();
                }
                None
            }
        };
        let Some(vmm) = vmm else { return };
        let status = vmm.wait_exit_or_give_up().await;
        let by_shim = self.kill_reason.get().map(|reason| &**reason);
        let reason = match status {
            Some(status) if by_shim.is_none() && self.is_oom_kill(status).await => {
                self.oom_killed.store(true, Ordering::Relaxed);
                tracing::warn!(pid = vmm.pid(), "{OOM_KILLED}");
                OOM_KILLED.to_owned()
            }
            Some(status) => {
                let lost = lost.map(|lost| format!("the VMM process ended with {status}, and {lost}"));
                notices::end_reason(progress, status, by_shim.or(lost.as_deref())).await
            }
            None => {
                let killed = by_shim.or(lost.as_deref()).unwrap_or(ENDED_BY_REQUEST);
                let reason = stuck(killed, vmm.timeout(VMM_EXIT_TIMEOUT));
                tracing::error!(pid = vmm.pid(), reason, "the VMM process does not exit");
                reason
            }
        };
        tracing::info!(reason, "the VM has ended");
        let agent = self.state.agent();
        self.state.enter(State::Gone(reason.into()));
        // A process that does not exit keeps the connection open. Without the close, calls would wait for their
        // timeouts.
        if let Some(agent) = agent {
            agent.close();
        }
    }

    /// Returns whether the node's OOM killer caused the VMM's exit with `status`. The shim cannot tell a SIGKILL of the
    /// OOM killer from another SIGKILL, but the kernel counts the former for the cgroup.
    async fn is_oom_kill(&self, status: ExitStatus) -> bool {
        let Some(cgroup) = self.cgroup.clone().filter(|_| status.signal() == Some(libc::SIGKILL)) else { return false };
        blocking::spawn(move || oom::kills(&cgroup)).await.is_ok_and(|kills| kills > 0)
    }
}

/// Returns the reason of the VM's end if the VMM process has not exited after SIGKILL. `killed` says why the shim
/// killed the process, and `limit` is how long the shim has waited.
pub fn stuck(killed: &str, limit: Duration) -> String {
    format!(
        "{killed}; the VMM process did not exit within {} s after SIGKILL, perhaps because a thread waits in the host's \
         kernel",
        limit.as_secs()
    )
}

/// Sets the state to running, and forwards the agent's events. When the events end, kills the VM, because without the
/// events, the shim would not notice when processes exit. Returns why the events have ended.
async fn forward_events(agent: Agent, vmm: &Vmm, state: &StateCell, reports: &mpsc::Sender<Report>) -> String {
    let mut events = match agent.events().await {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "failed to subscribe to the agent's events");
            let error = bounded(&error.to_string(), MAX_STREAM_ERROR);
            let reason = format!("failed to subscribe to the agent's events: {error}");
            state.enter(State::Failed(reason.as_str().into()));
            vmm.kill();
            return reason;
        }
    };
    state.enter(State::Running(agent));
    // The connection normally ends with the process, after the last events. But a process that does not exit keeps the
    // connection open, and so does a copy of the socket elsewhere.
    let vmm_ended = async {
        if vmm.wait_exit_or_give_up().await.is_some() {
            tokio::time::sleep(vmm.timeout(LAST_EVENTS_TIMEOUT)).await;
        }
    };
    tokio::pin!(vmm_ended);
    let reason = loop {
        let event = tokio::select! {
            // Events that have arrived come first, even if the shim runs so late that the time for them is over.
            biased;
            event = events.recv() => event,
            () = &mut vmm_ended => break "the connection to the agent did not end".to_owned(),
        };
        match event {
            Ok(Some(event)) => match agent::check(event) {
                Some(report) => drop(reports.send(report).await),
                None => tracing::warn!("the agent sent an unknown or invalid event"),
            },
            Ok(None) => break "the agent closed the stream of its events".to_owned(),
            Err(error) => {
                tracing::debug!(%error, "the agent's event stream failed");
                let error = bounded(&error.to_string(), MAX_STREAM_ERROR);
                break format!("the stream of the agent's events failed: {error}");
            }
        }
    };
    vmm.kill();
    reason
}
