//! A sandbox's directory on the host, `/run/husk/<namespace>/<sandbox>`.
//!
//! If the shim has ended unexpectedly, the shim's `delete` command uses the directory's files for the cleanup.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_base::sys::pidfd;

use crate::resources::cgroup;
use crate::systemd::Unit;
use crate::volumes::{Share, ShareError};

/// Directory that contains the directories of all namespaces and sandboxes.
pub const ROOT: &str = "/run/husk";

/// File with the record that `husk ps` reads.
const RECORD: &str = "sandbox.json";
/// File that exists while the sandbox's shim waits for a VMM process that does not exit. The shim then removes the
/// cgroup and the directory itself.
const STUCK: &str = "stuck";
/// Files that a cleanup needs: the processes, the cgroup and the systemd scope.
const CLEANUP: [&str; 4] = ["vmm.pid", "shim.pid", "cgroup", "unit"];
/// Directory with an empty file for each container that the shim has, by the container's id.
const CONTAINERS: &str = "containers";
/// How long the processes of a sandbox may take to exit after SIGKILL.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Temporary file that is renamed to `RECORD`.
const RECORD_NEW: &str = "sandbox.json.new";

/// The directory of one sandbox.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

/// A process, identified by PID and start time. If the PID is reused, the new process has another start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    /// PID.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of proc_pid_stat(5).
    pub start: u64,
}

/// A failure to create the directory or to write a file in it.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A directory cannot be created.
    #[error("failed to create the state directory {path}")]
    Create {
        /// Path of the directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The share cannot be mounted.
    #[error(transparent)]
    Share(ShareError),
    /// A file cannot be written.
    #[error("failed to write {path}")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

impl StateDir {
    /// Returns the directory of a sandbox. The directory does not have to exist.
    pub fn new(namespace: &str, sandbox: &str) -> Self {
        Self { path: Path::new(ROOT).join(namespace).join(sandbox) }
    }

    /// Returns a directory at another place.
    #[cfg(test)]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Removes the record of the cgroup and its systemd scope.
    pub fn forget_cgroup(&self) {
        for name in ["cgroup", "unit"] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the file for the timeline.
    pub fn timeline(&self) -> PathBuf {
        self.path.join("timeline.json")
    }

    /// Creates the directory and mounts the share in it. The mount is visible only in the shim's mount namespace.
    ///
    /// # Errors
    /// Fails with a [`StateError`] if the directory cannot be created, or if the share cannot be mounted.
    pub fn create(&self) -> Result<Share, StateError> {
        // Retry once, because the shim of another sandbox may remove the parent directory at the same time.
        let make = || std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&self.path);
        make().or_else(|_| make()).map_err(|source| StateError::Create { path: self.path.clone(), source })?;
        Share::mount(&self.path).map_err(StateError::Share)
    }

    /// Records `process` in the file `name`.
    ///
    /// # Errors
    /// Fails with [`StateError::Write`] if the file cannot be written.
    pub fn write_process(&self, name: &str, process: ProcessId) -> Result<(), StateError> {
        self.write(name, &format!("{} {}\n", process.pid, process.start))
    }

    /// Writes `text` to the file `name`.
    ///
    /// # Errors
    /// Fails with [`StateError::Write`] if the file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        std::fs::write(&path, text).map_err(|source| StateError::Write { path, source })
    }

    /// Records the sandbox for `husk ps`. The record is replaced atomically.
    ///
    /// # Errors
    /// Fails with [`StateError::Write`] if the record cannot be written.
    pub fn record(&self, sandbox: &husk_config::sandbox::Sandbox) -> Result<(), StateError> {
        let path = self.path.join(RECORD);
        let write = |source| StateError::Write { path: path.clone(), source };
        let text = serde_json::to_string(sandbox).map_err(|error| write(error.into()))?;
        self.write(RECORD_NEW, &text)?;
        std::fs::rename(self.path.join(RECORD_NEW), &path).map_err(write)
    }

    /// Updates vCPUs and memory in the record. Does nothing if the record does not exist.
    ///
    /// # Errors
    /// Fails with [`StateError::Write`] if the record cannot be written.
    pub fn record_size(&self, vcpus: u8, memory_mib: u64) -> Result<(), StateError> {
        let record =
            self.read(RECORD).and_then(|text| serde_json::from_str::<husk_config::sandbox::Sandbox>(&text).ok());
        match record {
            Some(record) if (record.vcpus, record.memory_mib) != (vcpus, memory_mib) => {
                self.record(&husk_config::sandbox::Sandbox { vcpus, memory_mib, ..record })
            }
            _ => Ok(()),
        }
    }

    /// Records that the shim has the container `id`. Best effort.
    pub fn record_container(&self, id: &str) {
        let dir = self.path.join(CONTAINERS);
        let written = match std::fs::create_dir(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            _ => std::fs::write(dir.join(id), ""),
        };
        if let Err(error) = written {
            tracing::warn!(container = id, %error, "failed to record the container for the action delete");
        }
    }

    /// Records that the shim no longer has the container `id`.
    pub fn forget_container(&self, id: &str) {
        let _ = std::fs::remove_file(self.path.join(CONTAINERS).join(id));
    }

    /// Returns whether the shim has recorded that it has the container `id`.
    pub fn has_container(&self, id: &str) -> bool {
        self.path.join(CONTAINERS).join(id).exists()
    }

    /// Returns the process that the file `name` records, or `None` if the file is missing or invalid.
    pub fn read_process(&self, name: &str) -> Option<ProcessId> {
        let text = self.read(name)?;
        let (pid, start) = text.trim().split_once(' ')?;
        Some(ProcessId { pid: pid.parse().ok().filter(|pid| *pid > 1)?, start: start.parse().ok()? })
    }

    /// Returns the contents of the file `name`, or `None` if the file cannot be read.
    pub fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path.join(name)).ok()
    }

    /// Kills the sandbox's processes. Removes the sandbox's mounts, cgroup and directory from the host. Does nothing if
    /// the shim waits for a VMM process that does not exit.
    pub fn clean_up(&self) {
        if self.read(STUCK).is_some() && self.read_process("shim.pid").is_some_and(ProcessId::is_alive) {
            return;
        }
        // The processes get the signals before the first wait, because a VMM process that waits in the node's kernel
        // can take all the time.
        let own = std::process::id().cast_signed();
        let processes = ["vmm.pid", "shim.pid"].into_iter().filter_map(|name| self.read_process(name));
        let killed: Vec<_> = processes.filter(|process| process.pid != own).filter_map(ProcessId::kill).collect();
        let end = Instant::now() + EXIT_TIMEOUT;
        killed.iter().for_each(|process| wait_exit(process, end));
        let namespace = self.path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let dirs = self.read("cgroup").unwrap_or_default();
        let dirs: Vec<&Path> = dirs.lines().map(Path::new).collect();
        let unit = self.read("unit").map(Unit::new);
        cgroup::remove(&dirs, unit.as_ref(), namespace.unwrap_or_default());
        self.remove();
    }

    /// Unmounts the share and removes the files that nothing needs while the shim waits for a VMM process that does not
    /// exit. If the shim is killed during this wait, `clean_up` still finds the processes and the cgroup.
    pub fn remove_except_cleanup(&self) {
        if let Err(error) = self.write(STUCK, "") {
            tracing::warn!(error = %crate::chain(&error), "failed to record that the VMM process does not exit");
        }
        self.unmount_share();
        self.remove_files(|name| name != STUCK && !CLEANUP.contains(&name));
    }

    fn unmount_share(&self) {
        Share { host: self.path.join("share"), guest: self.path.join("guest") }.unmount();
    }

    /// Removes the known files that `select` selects. Removes nothing else, and never recursively, because a file
    /// system may be mounted below the directory.
    fn remove_files(&self, select: impl Fn(&str) -> bool) {
        let others = ["address", "timeline.json", RECORD, RECORD_NEW, STUCK];
        let all = CLEANUP.iter().chain(&others).chain(&crate::pod::FILES);
        for name in all.filter(|name| select(name)) {
            let _ = std::fs::remove_file(self.path.join(name));
        }
        if select(CONTAINERS) {
            let dir = self.path.join(CONTAINERS);
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                let _ = std::fs::remove_file(entry.path());
            }
            let _ = std::fs::remove_dir(&dir);
        }
    }

    /// Unmounts the share and removes the directory. If the parent directory is then empty, removes the parent
    /// directory, too.
    pub fn remove(&self) {
        self.unmount_share();
        self.remove_files(|_| true);
        if let Err(error) = std::fs::remove_dir(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "failed to remove the state directory");
        }
        if let Some(namespace) = self.path.parent() {
            let _ = std::fs::remove_dir(namespace);
        }
    }
}

impl ProcessId {
    /// Returns the process with this PID, if it exists.
    pub fn read(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid: i32::try_from(pid).ok()?, start: start_time(&stat)? })
    }

    /// Returns whether the process runs. A process with the same PID and another start time is another process.
    fn is_alive(self) -> bool {
        Self::read(self.pid.cast_unsigned()) == Some(self)
    }

    /// Kills the process, and waits until the process has ended, at most for `EXIT_TIMEOUT`. Does nothing if the PID
    /// belongs to another process.
    pub fn kill_and_wait(self) {
        if let Some(process) = self.kill() {
            wait_exit(&process, Instant::now() + EXIT_TIMEOUT);
        }
    }

    /// Kills the process. Returns its pidfd, or `None` if the PID belongs to another process.
    fn kill(self) -> Option<OwnedFd> {
        let fd = pidfd::open(self.pid).ok()?;
        // Compare the start times only after the pidfd is open. If the start times match, the PID has not been reused.
        // The pidfd then refers to the recorded process.
        if !self.is_alive() {
            return None;
        }
        let _ = pidfd::send_signal(fd.as_fd(), libc::SIGKILL);
        Some(fd)
    }
}

/// Waits until the process of a pidfd has ended, at most until `end`.
fn wait_exit(process: &OwnedFd, end: Instant) {
    let mut poll = [nix::poll::PollFd::new(process.as_fd(), nix::poll::PollFlags::POLLIN)];
    let rest = u16::try_from(end.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u16::MAX);
    let _ = nix::poll::poll(&mut poll, rest);
}

/// Returns field 22 of /proc/pid/stat. The command name in field 2 can contain any character and ends at the last `)`.
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
    fn record_size_updates_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir { path: dir.path().join("s") };
        state.record_size(2, 100).unwrap();
        std::fs::create_dir(state.path()).unwrap();
        let record = husk_config::sandbox::Sandbox {
            id: "s".into(),
            namespace: "n".into(),
            pod: String::new(),
            vcpus: 1,
            memory_mib: 128,
            started: 7,
            vmm_pid: 1,
            shim_pid: 2,
            configured_seccomp: Some(husk_config::Seccomp::Log),
        };
        state.record(&record).unwrap();
        state.record_size(2, 512).unwrap();
        let text = state.read(RECORD).unwrap();
        let expected = husk_config::sandbox::Sandbox { vcpus: 2, memory_mib: 512, ..record };
        assert_eq!(serde_json::from_str::<husk_config::sandbox::Sandbox>(&text).unwrap(), expected);
        state.remove();
        assert!(!state.path().exists());
    }

    /// Writes the files as version 0.1.0 wrote them. If a change of the code makes this test fail, `delete` no longer
    /// cleans up after a shim of the previous version.
    #[test]
    fn clean_up_reads_the_files_of_the_previous_version() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir { path: dir.path().join("k8s.io").join("s") };
        std::fs::create_dir_all(state.path().join("share")).unwrap();
        std::fs::create_dir(state.path().join("guest")).unwrap();
        let [mut vmm, mut shim] = [0, 1].map(|_| std::process::Command::new("sleep").arg("60").spawn().unwrap());
        let process = |child: &std::process::Child| {
            let start = start_time(&std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap()).unwrap();
            format!("{} {start}\n", child.id())
        };
        let cgroup = dir.path().join("cgroup");
        for (name, text) in [
            ("vmm.pid", process(&vmm)),
            ("shim.pid", process(&shim)),
            ("cgroup", format!("{}\n", cgroup.display())),
            ("address", "unix:///run/containerd/s/0123".to_owned()),
            ("timeline.json", "{}".to_owned()),
            (
                "sandbox.json",
                r#"{"id":"s","namespace":"k8s.io","pod":"default/p","vcpus":1,"memory_mib":128}"#.to_owned(),
            ),
        ] {
            std::fs::write(state.path().join(name), text).unwrap();
        }
        state.clean_up();
        assert!(!vmm.wait().unwrap().success() && !shim.wait().unwrap().success());
        assert!(!dir.path().join("k8s.io").exists());
    }

    #[test]
    fn clean_up_leaves_a_stuck_vmm_to_its_shim_while_the_shim_lives() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir { path: dir.path().join("k8s.io").join("s") };
        std::fs::create_dir_all(state.path()).unwrap();
        let mut shim = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        state.write_process("shim.pid", ProcessId::read(shim.id()).unwrap()).unwrap();
        for name in ["vmm.pid", "cgroup", "unit", "address", RECORD] {
            state.write(name, "").unwrap();
        }
        state.remove_except_cleanup();
        state.clean_up();
        for name in CLEANUP {
            assert!(state.read(name).is_some(), "{name} is needed for the cleanup");
        }
        assert_eq!((state.read("address"), state.read(RECORD)), (None, None));
        assert!(shim.try_wait().unwrap().is_none());
        shim.kill().unwrap();
        shim.wait().unwrap();
        state.clean_up();
        assert!(!state.path().exists());
    }

    #[test]
    fn kill_and_wait_does_not_kill_a_process_that_reuses_the_pid() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::read(child.id()).unwrap();
        ProcessId { start: id.start + 1, ..id }.kill_and_wait();
        assert!(child.try_wait().unwrap().is_none());
        id.kill_and_wait();
        assert!(!child.wait().unwrap().success());
    }
}
