//! Computes and sets the VMM's `oom_score_adj`, which this module calls the score. If the node runs out of memory, the
//! OOM killer uses the scores to select a process.
//!
//! Under runc, a container's processes get the score from the container's specification. Under Husk, killing the VMM
//! ends all containers of the pod. Therefore, the VMM gets the lowest score of these containers.

use std::collections::HashMap;
use std::io;
use std::sync::Mutex;

use crate::lock;

/// Score of a container without a score in its specification, and of a VMM without containers. Without this default,
/// the VMM would keep the low score that it inherits from containerd.
pub const DEFAULT: i32 = 0;

/// Scores of the containers by container id.
#[derive(Default)]
pub struct Scores(Mutex<HashMap<String, i32>>);

impl Scores {
    /// Sets the score of container `id`. Returns the lowest score of all containers.
    pub fn insert(&self, id: &str, score: i32) -> i32 {
        let mut scores = lock(&self.0);
        scores.insert(id.to_owned(), score);
        lowest(&scores).unwrap_or(score)
    }

    /// Removes the score of a container. Returns the lowest score of the remaining containers. Returns `None` if the
    /// container has no score, or if no container remains.
    pub fn remove(&self, id: &str) -> Option<i32> {
        let mut scores = lock(&self.0);
        scores.remove(id)?;
        lowest(&scores)
    }
}

fn lowest(scores: &HashMap<String, i32>) -> Option<i32> {
    scores.values().min().copied()
}

/// Sets the `oom_score_adj` of a process to `score`, which must be in the range -1000 to 1000.
///
/// # Errors
/// Fails if the process has ended, or if `score` is out of range (EINVAL).
pub fn set(pid: u32, score: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmm_has_the_lowest_score_of_its_containers() {
        let scores = Scores::default();
        assert_eq!(scores.insert("best-effort", 1000), 1000);
        assert_eq!(scores.insert("guaranteed", -997), -997);
        assert_eq!(scores.insert("burstable", 500), -997);
        assert_eq!(scores.remove("missing"), None);
        assert_eq!(scores.remove("guaranteed"), Some(500));
        assert_eq!(scores.remove("burstable"), Some(1000));
        assert_eq!(scores.remove("best-effort"), None);
    }

    #[test]
    fn set_changes_the_score_and_rejects_invalid_scores() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        set(child.id(), 321).unwrap();
        assert_eq!(std::fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).unwrap().trim(), "321");
        assert!(set(child.id(), 1001).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
