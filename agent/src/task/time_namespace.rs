//! The time namespace of an exec, which identifies the exec's processes.
//!
//! A separate cgroup would identify the descendants too, but would be visible to the container. Parent PIDs and sessions
//! are no identification, because a process can leave them. Each exec therefore has its own time namespace. All its
//! descendants inherit it, and only a process with CAP_SYS_ADMIN can leave it. Its clocks equal the guest's.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Time namespace of an exec, which identifies the exec's processes.
pub struct TimeNamespace {
    /// Keeps the namespace alive, so that its inode number is not reused.
    _file: File,
    /// Device and inode number.
    id: (u64, u64),
}

impl TimeNamespace {
    /// Opens the time namespace of the exec `pid` in the container with init `init`. Returns `None` if the exec has no
    /// time namespace of its own: it has already exited, or it has joined a time namespace of the container.
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
