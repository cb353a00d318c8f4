//! The end of a sandbox' cgroup.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Component, Path};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{MOUNT, legacy};
use crate::systemd::Unit;

/// Removes a sandbox' cgroup, one directory or one of each hierarchy, with what is below it, and containerd's own for the
/// namespace when it was the last in it. Waits a second at most for the end of processes that were killed. Where systemd
/// made it, it ends it: one that is gone before systemd saw it empty would be a unit without end.
pub fn remove(dirs: &[&Path], unit: Option<&Unit>, namespace: &str) {
    let dirs: Vec<&Path> = dirs.iter().copied().filter(|path| is_within(path)).collect();
    let deadline = Instant::now() + PATIENCE;
    // Of these and of all below: a process that was just killed leaves a moment after it was reaped.
    let empty: Vec<_> = dirs.iter().map(|path| wait_until_empty(path, deadline)).collect();
    unit.into_iter().for_each(super::stop);
    for (path, empty) in dirs.into_iter().zip(empty) {
        if let Err(error) = empty.and_then(|()| remove_directories(path)) {
            tracing::warn!(path = %path.display(), "cannot remove the cgroup: {error}");
        }
        if let Some(parent) = path.parent()
            && parent.file_name().is_some_and(|name| name == namespace)
        {
            let _ = std::fs::remove_dir(parent);
        }
    }
}

fn is_within(path: &Path) -> bool {
    path.starts_with(MOUNT) && path != Path::new(MOUNT) && path.components().all(|c| c != Component::ParentDir)
}

/// How long a cgroup's last processes, killed already, may take to be gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes a cgroup and those below it.
fn remove_directories(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_directories(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Waits until no process is in the cgroup or below it. The kernel tells of a change of `cgroup.events` by POLLPRI to
/// whoever has read it since it was opened (cgroup-v2.rst, "Basic Operations").
fn wait_until_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    let mut events = match File::open(path.join("cgroup.events")) {
        // Version 1 tells nobody; or it is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return legacy::wait_until_empty(path, deadline),
        other => other?,
    };
    loop {
        let mut text = String::new();
        let read = events.seek(SeekFrom::Start(0)).and_then(|_| events.read_to_string(&mut text));
        match read {
            // Removed by somebody else meanwhile.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(()),
            other => other?,
        };
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut wanted = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
