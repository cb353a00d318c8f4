//! The pids that tasks have on the host. A container by itself has the VMM's; those of a pod have one each, so that one
//! can be told from another where a specification names `/proc/PID/ns/pid`.

use std::collections::HashMap;
use std::sync::Mutex;

use super::Shim;
use crate::lock;
use crate::spec::Spec;

/// The pid of each container that has one of its own.
#[derive(Default)]
pub(super) struct Pids(Mutex<HashMap<String, u32>>);

impl Shim {
    /// What containerd is told as the pid of a container and its processes: a live process or thread of the host that is
    /// in the pod's network namespace and cgroup.
    pub(super) fn pid(&self, container: &str) -> u32 {
        lock(&self.pids.0).get(container).copied().unwrap_or_else(|| self.sandbox.pid())
    }

    /// The containers with a pid of their own.
    pub(super) fn pids(&self) -> HashMap<u32, String> {
        lock(&self.pids.0).iter().map(|(id, pid)| (*pid, id.clone())).collect()
    }

    /// Takes a pid for a container of a pod; [`Shim::give_back_pid`] follows.
    pub(super) async fn take_pid(&self, container: &str, spec: &Spec) {
        if !spec.group(container).is_ok_and(|group| group != container) {
            return;
        }
        match self.sandbox.take_pid().await {
            Ok(pid) => drop(lock(&self.pids.0).insert(container.to_owned(), pid)),
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(
                    container,
                    error,
                    "no pid of its own: no other container can join its process namespace"
                );
            }
        }
    }

    /// The container is gone, or was never made.
    pub(super) async fn give_back_pid(&self, container: &str) {
        let pid = lock(&self.pids.0).remove(container);
        if let Some(pid) = pid
            && !self.sandbox.is_dead()
        {
            self.sandbox.give_back_pid(pid).await;
        }
    }
}
