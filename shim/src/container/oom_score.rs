//! Keeps the VMM's `oom_score_adj` equal to the lowest `oom_score_adj` of the pod's containers.

use crate::container::Shim;
use crate::oci::Spec;
use crate::resources::oom_score::{DEFAULT, set};

impl Shim {
    /// Records the `oom_score_adj` of a new container, and applies the pod's lowest value to the VMM. The caller must
    /// later call [`Shim::release_oom_score`].
    pub(crate) fn apply_oom_score(&self, id: &str, spec: &Spec) {
        let score = spec.process.oom_score_adj.unwrap_or(DEFAULT);
        self.set_oom_score(self.oom_scores.insert(id, score));
    }

    /// Drops the recorded `oom_score_adj` of a container that was deleted or could not be created. Applies the lowest
    /// value of the other containers to the VMM.
    pub(crate) fn release_oom_score(&self, id: &str) {
        if let Some(score) = self.oom_scores.remove(id) {
            self.set_oom_score(score);
        }
    }

    /// Sets the VMM's `oom_score_adj`. A failure is only logged, because the VMM may have ended.
    fn set_oom_score(&self, score: i32) {
        let pid = self.sandbox.pid();
        if !self.sandbox.is_dead()
            && let Err(error) = set(pid, score)
        {
            tracing::warn!(pid, score, %error, "failed to set oom_score_adj of the VMM");
        }
    }
}
