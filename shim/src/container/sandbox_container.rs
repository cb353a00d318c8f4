//! The sandbox container of a Kubernetes pod. Its program, `pause`, only waits for signals.
//!
//! Husk does not run `pause`. If a signal would end `pause`, the shim ends the VM. The shim then reports the exit
//! status that `pause` would have after this signal.

use std::sync::Arc;
use std::time::SystemTime;

use husk_proto::containerd::api::{CreateTaskRequest, KillRequest};
use tokio::task::JoinSet;

use crate::container::containers::{Container, Reservation};
use crate::container::process::{Exit, ExitReport, Process};
use crate::container::{Shim, stdio_paths};
use crate::error::ServiceError;
use crate::oci::Spec;
use crate::sandbox::disks::DISK_FLUSH_TIMEOUT;

impl Shim {
    /// Waits until the agent is ready, runs the hooks, and adds the sandbox container without a process in the guest.
    pub(crate) async fn create_sandbox_container(
        &self,
        request: &CreateTaskRequest,
        spec: Spec,
        reservation: &Reservation<'_>,
    ) -> Result<(), ServiceError> {
        reservation.unless_cancelled(self.ready_agent()).await?;
        self.run_hooks("prestart", &spec.hooks.prestart, "creating", request, &spec).await?;
        self.run_hooks("createRuntime", &spec.hooks.create_runtime, "creating", request, &spec).await?;
        let io = stdio_paths(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        let init = Process::new(&request.id, "", io);
        self.publish_created(
            &Arc::new(Container::new(&request.id, &request.bundle, spec, init, JoinSet::new())),
            request,
        );
        Ok(())
    }

    /// Handles a signal to the sandbox container. If the signal would end the pause program, ends the pod's VM, unless
    /// the pod is already ending in an orderly way.
    pub(crate) async fn kill_sandbox_container(&self, container: &Container, request: &KillRequest) {
        let Some(status) = status_after(request.signal) else { return };
        let limit = self.sandbox.timeout(DISK_FLUSH_TIMEOUT);
        if !self.is_ending() {
            self.sandbox.flush_disks_within(limit).await;
        }
        if self.is_ending() {
            // The orderly end also records the exit.
            let _ = tokio::time::timeout(limit, self.wait_orderly_end()).await;
            return;
        }
        let exit = Exit { status, at: SystemTime::now() };
        let seen = container.init.record_exit(exit);
        self.sandbox.kill();
        if seen == ExitReport::Publish {
            self.publish_exit(&container.init, exit);
        }
    }
}

/// Returns the exit status of the pause program after a signal, or `None` if the signal does not end the program.
///
/// The program handles SIGINT and SIGTERM (kubernetes/build/pause/linux/pause.c). Of all other signals, only SIGKILL
/// ends PID 1 of a PID namespace (pid_namespaces(7)).
fn status_after(signal: u32) -> Option<u32> {
    match i32::try_from(signal).unwrap_or_default() {
        libc::SIGINT | libc::SIGTERM => Some(0),
        libc::SIGKILL => Some(128 + 9),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sigint_sigterm_and_sigkill_end_the_sandbox_container() {
        assert_eq!(status_after(9), Some(137));
        assert_eq!(status_after(15), Some(0));
        assert_eq!(status_after(0), None);
        assert_eq!(status_after(1), None);
    }
}
