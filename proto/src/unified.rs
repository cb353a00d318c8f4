//! Checks the keys of `linux.resources.unified`: names of files in a container's cgroup (OCI runtime specification,
//! config-linux.md, "Unified").

/// Files of the cgroup core that a pod may set: limits, and the switch for PSI. The other files, such as
/// `cgroup.procs` and `cgroup.kill`, move or kill processes.
const CORE_SETTABLE: [&str; 3] = ["cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"];

/// Why a key of `unified` is refused. Without this check, a key such as `../x` or `/proc/sys/kernel/core_pattern` would
/// be the path of a file outside the container's cgroup. The first two texts end like those of runc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnifiedError {
    /// The key is a path.
    #[error("the key must be a file name (no slashes)")]
    Path,
    /// The key is not the name of a cgroup file.
    #[error("the key must be in the form CONTROLLER.PARAMETER")]
    Form,
    /// The file belongs to the cgroup core and must not be set.
    #[error("the file cannot be set; the only settable files of the cgroup core are {}", CORE_SETTABLE.join(", "))]
    NotSettable,
}

/// Checks a key of `unified`.
///
/// # Errors
/// Fails if the key is a path, is not in the form CONTROLLER.PARAMETER, or is another file of the cgroup core.
pub fn check(key: &str) -> Result<(), UnifiedError> {
    if key.contains('/') {
        return Err(UnifiedError::Path);
    }
    match key.split_once('.') {
        None | Some(("", _) | (_, "")) => Err(UnifiedError::Form),
        Some(("cgroup", _)) if !CORE_SETTABLE.contains(&key) => Err(UnifiedError::NotSettable),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_accepts_only_names_of_settable_files() {
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
            assert_eq!(check(key), Err(UnifiedError::NotSettable), "{key}");
        }
    }
}
