//! The sandbox container of a Kubernetes pod: a record that stands for the virtual machine. Its image, which waits for
//! signals and does nothing else, is never run; what containerd sees of it is what that program would do.

use std::sync::Arc;
use std::time::SystemTime;

use husk_proto::containerd::api::{CreateTaskRequest, KillRequest};
use tokio::task::JoinSet;

use super::container::Container;
use super::process::{Exit, Process, Seen};
use super::{Refusal, Shim, paths};
use crate::spec::Spec;

impl Shim {
    /// Makes the record once the guest takes containers.
    pub(super) async fn create_pause(&self, request: &CreateTaskRequest, spec: Spec) -> ttrpc::Result<()> {
        self.sandbox.ready().await.map_err(|error| Refusal::Failed(error.to_string()))?;
        self.run_hooks("prestart", &spec.hooks.prestart, "creating", request, &spec).await?;
        self.run_hooks("createRuntime", &spec.hooks.create_runtime, "creating", request, &spec).await?;
        let io = paths(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        let init = Process::new(&request.id, "", io);
        self.created(&Arc::new(Container::new(&request.id, &request.bundle, spec, init, JoinSet::new())), request);
        Ok(())
    }

    /// Signals it. The signals that end it end the pod: the virtual machine with whatever still runs there.
    pub(super) async fn kill_pause(&self, container: &Container, request: &KillRequest) {
        let Some(status) = status_after(request.signal) else { return };
        self.sandbox.flush_disks().await;
        let exit = Exit { status, at: SystemTime::now() };
        let seen = container.init.ended(exit);
        self.sandbox.kill();
        if seen == Seen::Now {
            self.tell_exit(&container.init, exit);
        }
    }
}

/// How the pause program ends by a signal, if it does: it has handlers for two, and process 1 of a process namespace
/// gets no other but SIGKILL (kubernetes/build/pause/linux/pause.c; pid_namespaces(7)).
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
    fn signals() {
        assert_eq!(status_after(9), Some(137));
        assert_eq!(status_after(15), Some(0));
        assert_eq!(status_after(0), None);
        assert_eq!(status_after(1), None);
    }
}
