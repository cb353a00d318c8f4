//! Checks the keys of `linux.resources.unified`: names of files in a container's cgroup (OCI runtime specification,
//! config-linux.md, "Unified").

/// Files of the cgroup core that are limits. The core's other files, such as `cgroup.procs` and `cgroup.kill`, move or
/// kill processes.
const CORE_LIMITS: [&str; 3] = ["cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"];

/// Why a key of `unified` is refused. Without this check, a key such as `../x` or `/proc/sys/kernel/core_pattern` would
/// be the path of a file outside of the container's cgroup. The first two texts are those of runc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnifiedError {
    /// The key is a path.
    #[error("the key must be a file name (no slashes)")]
    Path,
    /// The key is not the name of a cgroup file.
    #[error("the key must be in the form CONTROLLER.PARAMETER")]
    Form,
    /// The file belongs to the cgroup core and is not a limit.
    #[error("the file is not a limit; of the files of the cgroup core, only {} can be set", CORE_LIMITS.join(", "))]
    NotALimit,
}

/// Checks a key of `unified`.
///
/// # Errors
/// Fails if the key is not the name of a file with which a cgroup limits its processes.
pub fn check(key: &str) -> Result<(), UnifiedError> {
    if key.contains('/') {
        return Err(UnifiedError::Path);
    }
    match key.split_once('.') {
        None | Some(("", _) | (_, "")) => Err(UnifiedError::Form),
        Some(("cgroup", _)) if !CORE_LIMITS.contains(&key) => Err(UnifiedError::NotALimit),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_accepts_only_names_of_limits() {
        for key in ["memory.high", "pids.max", "hugetlb.2MB.rsvd.max", "cgroup.max.depth", "misc.max"] {
            assert_eq!(check(key), Ok(()), "{key}");
        }
        for key in ["/proc/sys/kernel/core_pattern", "../c2/memory.max", "./io.max", "memory.max/", "a/b.c"] {
            assert_eq!(check(key), Err(UnifiedError::Path), "{key}");
        }
        for key in ["", ".", "..", "...", "memory", "memory.", ".max"] {
            assert_eq!(check(key), Err(UnifiedError::Form), "{key}");
        }
        for key in ["cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.subtree_control", "cgroup.freeze"] {
            assert_eq!(check(key), Err(UnifiedError::NotALimit), "{key}");
        }
    }
}
