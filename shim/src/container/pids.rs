//! PIDs that the shim reports to containerd for containers.
//!
//! A sandbox container or a container outside a pod has the VMM's PID. Every other container has its own PID. If a
//! container joins the PID namespace of another container, the specification contains the path `/proc/PID/ns/pid`. The
//! shim identifies the other container by the PID in this path.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::container::Shim;
use crate::error::ServiceError;
use crate::lock;
use crate::oci::Spec;
use crate::vm::vmm::VmmError;

/// PIDs of the containers that have their own PID, by container id.
#[derive(Default)]
pub(crate) struct Pids(Mutex<HashMap<String, u32>>);

impl Shim {
    /// Returns the PID that the shim reports to containerd for a container and its processes.
    ///
    /// The PID belongs to a live process or thread on the host. This process or thread is in the pod's network
    /// namespace and cgroup.
    pub(crate) fn pid(&self, container: &str) -> u32 {
        lock(&self.pids.0).get(container).copied().unwrap_or_else(|| self.sandbox.pid())
    }

    /// Returns the ids of the containers that have their own PID, by PID.
    pub(crate) fn pids(&self) -> HashMap<u32, String> {
        lock(&self.pids.0).iter().map(|(id, pid)| (*pid, id.clone())).collect()
    }

    /// Acquires a PID for a container. Does nothing for a sandbox container or a container outside a pod. If the VMM
    /// refuses, the container has the VMM's PID. The caller must later call [`Shim::release_pid`].
    ///
    /// # Errors
    /// If the VMM does not answer. It would not answer the other requests for the container either, and each of them
    /// would wait for its own timeout.
    pub(crate) async fn acquire_pid(&self, container: &str, spec: &Spec) -> Result<(), ServiceError> {
        if !spec.group(container).is_ok_and(|group| group != container) {
            return Ok(());
        }
        match self.sandbox.acquire_pid().await {
            Ok(pid) => drop(lock(&self.pids.0).insert(container.to_owned(), pid)),
            Err(error @ VmmError::Timeout { .. }) => return Err(ServiceError::failed(error)),
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(
                    container,
                    error,
                    "failed to acquire a PID for the container; no container can join this container's PID namespace"
                );
            }
        }
        Ok(())
    }

    /// Releases the PID of a container that was deleted or could not be created.
    pub(crate) fn release_pid(&self, container: &str) {
        let pid = lock(&self.pids.0).remove(container);
        if let Some(pid) = pid
            && !self.sandbox.is_dead()
        {
            self.sandbox.release_pid(pid);
        }
    }
}
