//! Reads whether the node's OOM killer has killed a process of a sandbox's cgroup.

use std::fs;

use super::CgroupLocation;

/// Returns how many processes of the cgroup the OOM killer has killed, for the limit of the cgroup or of a parent, or
/// because the node has no memory. Returns 0 if the number is unknown.
///
/// Sources: `memory.events` (Documentation/admin-guide/cgroup-v2.rst), and `memory.oom_control` of cgroup v1, which has
/// the number since Linux 4.13.
pub fn kills(location: &CgroupLocation) -> u64 {
    let file = match location {
        CgroupLocation::V2(path) => Some(path.join("memory.events")),
        CgroupLocation::V1(_) => location.controller_dir("memory").map(|path| path.join("memory.oom_control")),
    };
    let text = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    let number = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
    number.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_reads_the_number_of_both_cgroup_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        assert_eq!(kills(&CgroupLocation::V2(path.clone())), 0);
        fs::write(path.join("memory.events"), "low 0\nhigh 1\nmax 4\noom 2\noom_kill 3\noom_group_kill 0\n").unwrap();
        assert_eq!(kills(&CgroupLocation::V2(path.clone())), 3);
        fs::write(path.join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n").unwrap();
        assert_eq!(kills(&CgroupLocation::V1(vec![(vec!["memory".to_owned()], path)])), 5);
        assert_eq!(kills(&CgroupLocation::V1(Vec::new())), 0);
    }
}
