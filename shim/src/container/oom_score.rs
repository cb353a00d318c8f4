//! Keeps the VMM's `oom_score_adj` at the lowest score of the containers.

use crate::container::Shim;
use crate::oci::Spec;
use crate::resources::oom_score::{DEFAULT, set};

impl Shim {
    /// Takes the score of a new container into account. [`Shim::release_oom_score`] must follow.
    pub(crate) fn apply_oom_score(&self, id: &str, spec: &Spec) {
        let score = spec.process.oom_score_adj.unwrap_or(DEFAULT);
        self.set_oom_score(self.oom_scores.insert(id, score));
    }

    /// Releases the score of a container that was deleted or could not be created.
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
