//! A sandbox's directory on the host, `/run/husk/<namespace>/<sandbox>`: what `delete` needs to clean up after a shim.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::cgroup;
use crate::bundle::{Share, ShareError};
use crate::systemd::Unit;

/// Where all sandboxes are kept.
pub const ROOT: &str = "/run/husk";

/// What `husk ps` reads, and where it is written before it replaces what was there.
const NOTE: &str = "sandbox.json";
const NOTE_ASIDE: &str = "sandbox.json.new";

/// The directory of one sandbox.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

/// A process known by its pid and start time, so that a pid used again is not mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of proc_pid_stat(5).
    pub start: u64,
}

/// Why the directory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A directory cannot be made.
    #[error("making {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The share cannot be mounted.
    #[error(transparent)]
    Share(ShareError),
    /// A file cannot be written.
    #[error("writing {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl StateDir {
    /// The directory of a sandbox, there or not.
    pub fn new(namespace: &str, sandbox: &str) -> Self {
        Self { path: Path::new(ROOT).join(namespace).join(sandbox) }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The start's timeline.
    pub fn timeline(&self) -> PathBuf {
        self.path.join("timeline.json")
    }

    /// Makes the directory and mounts the share in it, which only this mount namespace sees.
    ///
    /// # Errors
    /// [`StateError`] naming what could not be made.
    pub fn create(&self) -> Result<Share, StateError> {
        // Two tries: the last sandbox of this namespace may just be removing the directory above.
        let make = || std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&self.path);
        make().or_else(|_| make()).map_err(|source| StateError::Create { path: self.path.clone(), source })?;
        Share::mount(&self.path).map_err(StateError::Share)
    }

    /// Notes a process under `name`.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub fn write_process(&self, name: &str, process: ProcessId) -> Result<(), StateError> {
        self.write(name, &format!("{} {}\n", process.pid, process.start))
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub fn write(&self, name: &str, text: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        std::fs::write(&path, text).map_err(|source| StateError::Write { path, source })
    }

    /// Notes for `husk ps` what the sandbox is; who reads meanwhile sees the old note or the new one.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub fn note(&self, sandbox: &husk_config::sandbox::Sandbox) -> Result<(), StateError> {
        let path = self.path.join(NOTE);
        let write = |source| StateError::Write { path: path.clone(), source };
        let text = serde_json::to_string(sandbox).map_err(|error| write(error.into()))?;
        self.write(NOTE_ASIDE, &text)?;
        std::fs::rename(self.path.join(NOTE_ASIDE), &path).map_err(write)
    }

    /// Notes that the sandbox has so many vCPUs and so much memory by now; one that was not noted is left so.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub fn note_size(&self, vcpus: u8, memory_mib: u64) -> Result<(), StateError> {
        let note = self.read(NOTE).and_then(|text| serde_json::from_str::<husk_config::sandbox::Sandbox>(&text).ok());
        match note {
            Some(note) if (note.vcpus, note.memory_mib) != (vcpus, memory_mib) => {
                self.note(&husk_config::sandbox::Sandbox { vcpus, memory_mib, ..note })
            }
            _ => Ok(()),
        }
    }

    /// A process noted earlier.
    pub fn read_process(&self, name: &str) -> Option<ProcessId> {
        let text = self.read(name)?;
        let (pid, start) = text.trim().split_once(' ')?;
        Some(ProcessId { pid: pid.parse().ok().filter(|pid| *pid > 1)?, start: start.parse().ok()? })
    }

    /// A small file written earlier.
    pub fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path.join(name)).ok()
    }

    /// Removes everything of the sandbox that is on the host: leftover processes, mounts, cgroup and the directory.
    pub fn clean_up(&self) {
        for name in ["vmm.pid", "shim.pid"] {
            if let Some(process) = self.read_process(name)
                && process.pid != std::process::id().cast_signed()
            {
                process.kill_and_wait();
            }
        }
        let namespace = self.path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let dirs = self.read("cgroup").unwrap_or_default();
        let dirs: Vec<&Path> = dirs.lines().map(Path::new).collect();
        let unit = self.read("unit").map(Unit::new);
        cgroup::remove(&dirs, unit.as_ref(), namespace.unwrap_or_default());
        self.remove();
    }

    /// Unmounts the share and removes the directory, and that of the namespace when it was the last.
    pub fn remove(&self) {
        Share { host: self.path.join("share"), guest: self.path.join("guest") }.unmount();
        // Only what is written here is removed: never a tree in which something may still be mounted.
        for name in ["vmm.pid", "shim.pid", "cgroup", "unit", "address", "timeline.json", NOTE, NOTE_ASIDE]
            .iter()
            .chain(&crate::pod::FILES)
        {
            let _ = std::fs::remove_file(self.path.join(name));
        }
        if let Err(error) = std::fs::remove_dir(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "state directory not removed");
        }
        if let Some(namespace) = self.path.parent() {
            let _ = std::fs::remove_dir(namespace);
        }
    }
}

impl ProcessId {
    /// The process with this pid, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid: i32::try_from(pid).ok()?, start: start_time(&stat)? })
    }

    /// Kills the process, if it is still the same, and waits until it is gone.
    pub fn kill_and_wait(self) {
        // SAFETY: pidfd_open takes a pid and flags and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let Ok(fd) = i32::try_from(fd) else { return };
        if fd < 0 {
            return;
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The descriptor is open: from here on the pid cannot be used again without this check noticing.
        if Self::of(self.pid.cast_unsigned()) != Some(self) {
            return;
        }
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), nix::sys::signal::Signal::SIGKILL);
        let mut poll = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
        let _ = nix::poll::poll(&mut poll, 5000u16);
    }
}

/// Field 22 of /proc/pid/stat; the name in field 2 may hold anything, its end is the last parenthesis.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_field_22() {
        let stat = "12 (a) b (c)) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time(""), None);
    }

    #[test]
    fn the_note_follows_the_size() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir { path: dir.path().join("s") };
        state.note_size(2, 100).unwrap();
        std::fs::create_dir(state.path()).unwrap();
        let note = husk_config::sandbox::Sandbox {
            id: "s".into(),
            namespace: "n".into(),
            pod: String::new(),
            vcpus: 1,
            memory_mib: 128,
            started: 7,
            vmm_pid: 1,
            shim_pid: 2,
        };
        state.note(&note).unwrap();
        state.note_size(2, 512).unwrap();
        let text = state.read(NOTE).unwrap();
        let expected = husk_config::sandbox::Sandbox { vcpus: 2, memory_mib: 512, ..note };
        assert_eq!(serde_json::from_str::<husk_config::sandbox::Sandbox>(&text).unwrap(), expected);
        state.remove();
        assert!(!state.path().exists());
    }

    #[test]
    fn a_reused_pid_is_left_alone() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        ProcessId { start: id.start + 1, ..id }.kill_and_wait();
        assert!(child.try_wait().unwrap().is_none());
        id.kill_and_wait();
        assert!(!child.wait().unwrap().success());
    }
}
