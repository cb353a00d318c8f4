//! Resizes the pod when its containers change. The pod grows before a container is created or a limit is raised. The
//! pod shrinks after a container is deleted or a limit is lowered.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::container::Shim;
use crate::error::ServiceError;
use crate::lock;
use crate::resources::growth::{Limits, PodLimits, Size};
use crate::resources::resize::Target;

/// Resource limits of the pod's containers.
#[derive(Default)]
pub(crate) struct ResourceLimits {
    pod: Mutex<PodLimits>,
    /// Whether a container's limits were updated. After an update, the pod may become smaller than its boot size.
    updated: AtomicBool,
}

/// The resources in an update request cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("failed to parse the resources")]
struct ParseError(#[source] serde_json::Error);

impl Shim {
    /// Grows the pod for a new container. The VM of a container outside a pod boots with its full size, unless its guest
    /// is made from a template.
    pub(crate) async fn reserve_resources(&self, id: &str, limits: Limits) -> Result<(), ServiceError> {
        let (before, huge) = (self.pod_size(), limits.huge_page_bytes > 0 || self.sandbox.huge_mib() > 0);
        lock(&self.limits.pod).insert(id.to_owned(), limits);
        let after = self.pod_size();
        self.log_vcpu_shortage();
        let is_whole =
            |size: Size| self.sandbox.resizer().is_none_or(|resizer| resizer.start.max(size) == resizer.start);
        // Creating a container must not shrink the pod. The size before the creation may also cover containers that do
        // not exist yet.
        match before.zip(after) {
            Some((before, after)) if before.max(after) != before || huge || !is_whole(before) => {
                self.resize(before).await
            }
            _ => Ok(()),
        }
    }

    /// Releases the resources of a container that was deleted or could not be created. Does not wait for the resize of
    /// the pod.
    pub(crate) fn release_resources(&self, id: &str) {
        self.release_oom_score(id);
        let removed = lock(&self.limits.pod).remove(id).is_some();
        // Do not resize a pod without containers, because its VM ends with the last container, unless a CreateSandbox
        // request created the sandbox.
        let goes_on = !self.containers.is_empty() || self.sandbox_state.is_created();
        if removed && goes_on && !self.sandbox.is_dead() {
            self.queue_resize();
        }
    }

    /// Queues a resize of the pod, and does not wait for the resize. The containers' limits determine the pod's size
    /// and the pod's limits on the host.
    pub(crate) fn queue_resize(&self) {
        if let Some((resizer, target)) = self.sandbox.resizer().zip(self.target(None)) {
            resizer.queue(target);
        }
    }

    /// Grows the pod for a container's new limits. `raw` contains these limits as JSON (OCI `LinuxResources`). Returns
    /// the update, which the caller must pass to [`Shim::finish_update`].
    pub(crate) async fn prepare_update(&self, id: &str, raw: &[u8]) -> Result<LimitsUpdate, ServiceError> {
        let before = lock(&self.limits.pod).get(id).cloned().unwrap_or_default();
        let after =
            before.clone().with_update(raw).map_err(|error| ServiceError::Invalid(crate::chain(&ParseError(error))))?;
        let change = LimitsUpdate { before, after };
        if let (true, Some(size)) = (change.before != change.after, self.pod_size()) {
            self.limits.updated.store(true, Ordering::Relaxed);
            lock(&self.limits.pod).insert(id.to_owned(), change.after.clone());
            self.log_vcpu_shortage();
            if let Err(error) = self.resize(size).await {
                self.finish_update(id, &change, false).await;
                return Err(error);
            }
        }
        Ok(change)
    }

    /// Keeps the new limits if `done` is true. Otherwise, restores the old limits. In both cases, the pod then shrinks
    /// to the size that its containers need.
    pub(crate) async fn finish_update(&self, id: &str, change: &LimitsUpdate, done: bool) {
        if change.before == change.after {
            return;
        }
        // A container that was deleted during the update has no entry in `limits.pod`.
        if let Some(limits) = lock(&self.limits.pod).get_mut(id) {
            *limits = if done { &change.after } else { &change.before }.clone();
        }
        if let Err(error) = self.resize(Size { vcpus: 0, memory_mib: 0 }).await {
            tracing::warn!(%error, "failed to shrink the pod after an update of a container's limits");
        }
    }

    /// Logs a message if the pod's containers may use more vCPUs than the pod can have.
    fn log_vcpu_shortage(&self) {
        let Some(resizer) = self.sandbox.resizer() else { return };
        let (wanted, most) = (resizer.growth.vcpus(lock(&self.limits.pod).values()), resizer.growth.max.vcpus);
        if wanted > most {
            tracing::info!(
                wanted,
                most,
                "the pod has fewer vCPUs than its containers may use (see the settings spare_vcpus and max_vcpus)"
            );
        }
    }

    fn pod_size(&self) -> Option<Size> {
        let growth = &self.sandbox.resizer()?.growth;
        Some(growth.size(lock(&self.limits.pod).values(), !self.limits.updated.load(Ordering::Relaxed)))
    }

    /// Resizes the pod to the size that its containers need, but at least to `min_size`.
    async fn resize(&self, min_size: Size) -> Result<(), ServiceError> {
        match self.sandbox.resizer().zip(self.target(Some(min_size))) {
            Some((resizer, target)) => resizer.resize(target).await.map_err(ServiceError::failed),
            None => Ok(()),
        }
    }

    fn target(&self, min_size: Option<Size>) -> Option<Target> {
        let (growth, size) = (&self.sandbox.resizer()?.growth, self.pod_size()?);
        let pods_huge_mib = self.sandbox.huge_mib();
        let pod = lock(&self.limits.pod);
        let huge_mib = growth.huge_mib(pod.values()).max(pods_huge_mib);
        let host = growth.host_limits(pod.values());
        Some(Target { size: min_size.map_or(size, |min_size| size.max(min_size)), huge_mib, host })
    }
}

/// An unfinished update of one container's limits.
#[derive(Debug)]
pub(crate) struct LimitsUpdate {
    before: Limits,
    after: Limits,
}
