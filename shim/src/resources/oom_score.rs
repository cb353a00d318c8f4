//! The VMM's `oom_score_adj`: which pod the host's OOM killer ends first if the node is short of memory.
//!
//! Under runc each container's processes have the score of its specification. Here the memory of all containers is the
//! VMM's. The VMM has the lowest score of its containers, because the OOM killer would end all of them together.

use std::collections::HashMap;
use std::io;
use std::sync::Mutex;

use crate::lock;

/// Score of a container whose specification has none, and of a VMM without containers. Without a score of its own the
/// VMM would have containerd's, with which the OOM killer ends it last.
pub const DEFAULT: i32 = 0;

/// Scores of the containers by container id.
#[derive(Default)]
pub struct Scores(Mutex<HashMap<String, i32>>);

impl Scores {
    /// Adds the score of a container. Returns the lowest of all.
    pub fn insert(&self, id: &str, score: i32) -> i32 {
        let mut scores = lock(&self.0);
        scores.insert(id.to_owned(), score);
        lowest(&scores).unwrap_or(score)
    }

    /// Removes the score of a container. Returns the lowest of the others, or `None` if nothing changes.
    pub fn remove(&self, id: &str) -> Option<i32> {
        let mut scores = lock(&self.0);
        scores.remove(id)?;
        lowest(&scores)
    }
}

fn lowest(scores: &HashMap<String, i32>) -> Option<i32> {
    scores.values().min().copied()
}

/// Sets the `oom_score_adj` of a process, -1000 to 1000.
///
/// # Errors
/// If the process has ended, and EINVAL for another score.
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
    fn set_changes_a_process_and_rejects_a_score_out_of_range() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        set(child.id(), 321).unwrap();
        assert_eq!(std::fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).unwrap().trim(), "321");
        assert!(set(child.id(), 1001).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
