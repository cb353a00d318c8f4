//! The pod's size follows its containers: more before a container gets more, less after it has less.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Refusal, Shim};
use crate::bundle::growth::{Limits, Pod, Size};
use crate::lock;
use crate::sandbox::resize::Target;

/// What the pod's containers may use.
#[derive(Default)]
pub(super) struct Sizes {
    pod: Mutex<Pod>,
    /// Somebody has changed a limit: from then on the pod may be smaller than at its start.
    changed: AtomicBool,
}

impl Shim {
    /// Makes room for a container that is about to be made. A container alone has all the room from the start.
    pub(super) async fn make_room(&self, id: &str, limits: Limits) -> Result<(), Refusal> {
        let (before, huge) = (self.pod_size(), limits.huge > 0 || self.sandbox.huge_mib() > 0);
        lock(&self.sizes.pod).insert(id.to_owned(), limits);
        let after = self.pod_size();
        self.tell_of_cut();
        // Containers come one by one, those of the start among them: none makes the pod smaller.
        match before.zip(after) {
            Some((before, after)) if before.max(after) != before || huge => self.resize(before).await,
            _ => Ok(()),
        }
    }

    /// Takes back the room of a container that is gone or was never made; nobody waits for that.
    pub(super) fn take_room(&self, id: &str) {
        let removed = lock(&self.sizes.pod).remove(id).is_some();
        // With the last container the machine goes.
        if removed && !self.containers.is_empty() && !self.sandbox.is_dead() {
            self.follow_pod();
        }
    }

    /// Has the pod get the size that its containers need, and the host its limits, some time soon.
    pub(super) fn follow_pod(&self) {
        if let Some((resizer, target)) = self.sandbox.resizer().zip(self.target(None)) {
            resizer.post(target);
        }
    }

    /// Makes room for a container's new limits (OCI `LinuxResources` as JSON); [`Shim::change_room`] follows.
    pub(super) async fn prepare_change(&self, id: &str, raw: &[u8]) -> Result<Change, Refusal> {
        let before = lock(&self.sizes.pod).get(id).cloned().unwrap_or_default();
        let after = before.clone().updated(raw).map_err(|error| Refusal::Invalid(format!("resources: {error}")))?;
        let change = Change { before, after };
        if let (true, Some(size)) = (change.before != change.after, self.pod_size()) {
            self.sizes.changed.store(true, Ordering::Relaxed);
            lock(&self.sizes.pod).insert(id.to_owned(), change.after.clone());
            self.tell_of_cut();
            if let Err(error) = self.resize(size).await {
                self.change_room(id, &change, false).await;
                return Err(error);
            }
        }
        Ok(change)
    }

    /// The container has its new limits, or still the old ones: what is not needed any more is given back.
    pub(super) async fn change_room(&self, id: &str, change: &Change, done: bool) {
        if change.before == change.after {
            return;
        }
        // Unless the container is gone meanwhile.
        if let Some(limits) = lock(&self.sizes.pod).get_mut(id) {
            *limits = if done { &change.after } else { &change.before }.clone();
        }
        if let Err(error) = self.resize(Size { vcpus: 0, memory_mib: 0 }).await {
            tracing::warn!(%error, "the pod keeps its size");
        }
    }

    /// A pod with fewer processors than its containers may use is slower than it would be under runc.
    fn tell_of_cut(&self) {
        let Some(resizer) = self.sandbox.resizer() else { return };
        let (wanted, most) = (resizer.growth.vcpus(lock(&self.sizes.pod).values()), resizer.growth.most.vcpus);
        if wanted > most {
            tracing::info!(
                wanted,
                most,
                "the pod has no more processors to get (spare_vcpus, max_vcpus, the host's own)"
            );
        }
    }

    fn pod_size(&self) -> Option<Size> {
        let growth = &self.sandbox.resizer()?.growth;
        Some(growth.size(lock(&self.sizes.pod).values(), !self.sizes.changed.load(Ordering::Relaxed)))
    }

    /// Gives the pod the size that its containers need, and at least `least`.
    async fn resize(&self, least: Size) -> Result<(), Refusal> {
        match self.sandbox.resizer().zip(self.target(Some(least))) {
            Some((resizer, target)) => {
                resizer.resize(target).await.map_err(|error| Refusal::Failed(crate::chain(&error)))
            }
            None => Ok(()),
        }
    }

    fn target(&self, least: Option<Size>) -> Option<Target> {
        let (growth, size) = (&self.sandbox.resizer()?.growth, self.pod_size()?);
        let pods_huge_mib = self.sandbox.huge_mib();
        let pod = lock(&self.sizes.pod);
        let huge_mib = growth.huge_mib(pod.values()).max(pods_huge_mib);
        let host = growth.host_limits(pod.values());
        Some(Target { size: least.map_or(size, |least| size.max(least)), huge_mib, host })
    }
}

/// A change of one container's limits, half done.
#[derive(Debug)]
pub(super) struct Change {
    before: Limits,
    after: Limits,
}
