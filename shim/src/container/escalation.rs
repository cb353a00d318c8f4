//! Ends the VM if the guest does not carry out a request to end a container.
//!
//! A hung guest or VMM cannot end a container. Nor can a container end while one of its processes waits for a hung file
//! system of the host. The shim then kills the VMM process. This ends all containers of the pod, because they share the
//! guest.

use std::sync::Arc;
use std::time::Duration;

use husk_config::BaseTimeout;

use crate::container::Shim;
use crate::container::containers::Container;
#[cfg(doc)]
use crate::container::exit_progress;
use crate::sandbox::disks::DISK_FLUSH_TIMEOUT;
use crate::vm::agent;

/// Timeout for the agent's answer to a request that sends a signal. The agent answers without waiting for another
/// process of the guest.
pub const SIGNAL_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(1);
/// Timeout for the agent's answer to a request that sends SIGKILL to a container.
pub const KILL_ANSWER_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(2);
/// How long a container may take to exit after SIGKILL.
pub const KILL_EXIT_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(4);
/// How long after its arrival a Delete request waits for the agent's answer. The container's processes have ended. This
/// includes the time for the remaining output, after which [`AGENT_DELETE_TIMEOUT`] is left.
pub const DELETE_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(5);
/// Minimum timeout for the agent's answer to the request that deletes a container. A client that reads the output
/// slowly must not take the time from a guest that is healthy.
pub const AGENT_DELETE_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(3500);
/// How long the shim waits for the exits of all containers after it has killed the VMM process. This is longer than
/// `VMM_EXIT_TIMEOUT` with the last events.
pub const VM_END_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(1500);

/// Returns the number of seconds, rounded up.
fn whole_secs(limit: Duration) -> u64 {
    limit.as_secs() + u64::from(limit.subsec_nanos() > 0)
}

impl Shim {
    /// Kills the VM if the container's init process does not exit within [`KILL_EXIT_TIMEOUT`]. While the exit makes
    /// progress, the process may take up to [`KILL_PROGRESS_TIMEOUT`](exit_progress::KILL_PROGRESS_TIMEOUT). Returns at
    /// once. Only the first call for a container has an effect.
    ///
    /// While the pod ends in an orderly way, the VM is not killed, because the guest still has to flush its disks.
    pub(crate) fn expect_exit(self: &Arc<Self>, container: &Arc<Container>) {
        if !container.claim_exit_guard() {
            return;
        }
        let (shim, container) = (Arc::clone(self), Arc::clone(container));
        let limit = self.sandbox.timeout(KILL_EXIT_TIMEOUT);
        tokio::spawn(async move {
            let waited = tokio::select! {
                biased;
                _ = container.init.wait() => return,
                waited = shim.wait_exit_stalls(&container, limit) => waited,
            };
            let (id, secs) = (&container.id, waited.as_secs());
            shim.fail_vm(format!("container {id} did not exit within {secs} s after SIGKILL"));
        });
    }

    /// Kills the VM because the agent has not answered. Waits until the VM has ended. From then on, all processes of
    /// the pod count as exited. The reason names `call`, which is a verb.
    pub(crate) async fn end_silent_vm(&self, container: &Container, call: &str, limit: Duration) {
        let id = &container.id;
        self.end_vm(container, format!("the agent did not {call} container {id} within {} s", whole_secs(limit))).await;
    }

    /// Kills the VM because of `reason`. Waits until the VM has ended.
    pub(crate) async fn end_vm(&self, container: &Container, reason: String) {
        self.fail_vm(reason);
        if !self.wait_vm_end().await {
            tracing::error!(container = container.id, "the VM has not ended, although the shim has killed it");
        }
    }

    /// Returns whether a call to the agent failed with `error` because the VM has ended. If the VM is ending, waits
    /// until it has ended: the connection to the agent breaks before the shim notices the end of the VMM process.
    pub(crate) async fn vm_has_ended_with(&self, error: &ttrpc::Error) -> bool {
        self.sandbox.is_dead() || agent::is_connection_error(error) && self.wait_vm_end().await
    }

    /// Waits until a VM that is being killed has ended, at most for [`VM_END_TIMEOUT`]. Returns whether it has ended.
    async fn wait_vm_end(&self) -> bool {
        let mut ended = self.vm_ended.subscribe();
        tokio::time::timeout(self.sandbox.timeout(VM_END_TIMEOUT), ended.wait_for(|ended| *ended)).await.is_ok()
    }

    /// Kills the VM because of `reason`. Leaves the VM to the orderly end while that is in progress. The orderly end
    /// has timeouts of its own.
    fn fail_vm(&self, reason: String) {
        if self.is_ending() {
            tracing::warn!(reason, "the shim does not kill the VM yet, because the pod is ending");
        } else {
            self.sandbox.fail(reason);
        }
    }

    /// Flushes the guest's disks, at most for `limit`, and kills the VM because of a request. While the pod ends in an
    /// orderly way, only waits for this end, at most as long as for the flush.
    pub(crate) async fn end_vm_by_request(&self, limit: Duration) {
        let limit = limit.min(self.sandbox.timeout(DISK_FLUSH_TIMEOUT));
        if !self.is_ending() {
            self.sandbox.flush_disks_within(limit).await;
        }
        if self.is_ending() {
            let _ = tokio::time::timeout(limit, self.wait_orderly_end()).await;
        } else {
            self.sandbox.kill();
        }
    }
}
