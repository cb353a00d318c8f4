//! The time namespace of an exec, by which the agent identifies the exec's processes.
//!
//! A separate cgroup would also identify the descendants, but the container would see that cgroup. Parent PIDs and
//! sessions do not identify the descendants, because a process can change its parent and its session. Therefore each
//! exec has its own time namespace. All descendants inherit the namespace, and only a process with CAP_SYS_ADMIN can
//! leave it. The clocks of the namespace equal the guest's clocks.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Time namespace of an exec.
pub struct TimeNamespace {
    /// Keeps the namespace alive, so that its inode number is not reused.
    _file: File,
    /// Device and inode number.
    id: (u64, u64),
}

impl TimeNamespace {
    /// Opens the time namespace of the exec `pid` in the container with init `init`. Returns `None` if the exec has
    /// already exited, or if the exec does not have its own time namespace.
    pub fn of_exec(pid: i32, init: i32) -> Option<Self> {
        let file = File::open(path(pid)).ok()?;
        let id = namespace_id(&file.metadata().ok()?);
        let others = [path(init), path(std::process::id().cast_signed())];
        let is_new = others.iter().all(|other| fs::metadata(other).is_ok_and(|meta| namespace_id(&meta) != id));
        is_new.then_some(Self { _file: file, id })
    }

    /// Whether the process `pid` is in this namespace.
    pub fn contains(&self, pid: i32) -> bool {
        fs::metadata(path(pid)).is_ok_and(|meta| namespace_id(&meta) == self.id)
    }
}

fn path(pid: i32) -> PathBuf {
    format!("/proc/{pid}/ns/time").into()
}

fn namespace_id(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_exec_returns_none_for_shared_and_missing_namespaces() {
        let own = std::process::id().cast_signed();
        assert!(TimeNamespace::of_exec(own, own).is_none());
        assert!(TimeNamespace::of_exec(i32::MAX, own).is_none());
    }
}
