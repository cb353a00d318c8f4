//! Removes a sandbox's cgroup.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Component, Path};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::resources::cgroup::{MOUNT, v1};
use crate::systemd::Unit;

/// Removes a sandbox's cgroup with all child cgroups. If the parent cgroup has the name `namespace` and is empty,
/// removes the parent cgroup, too.
///
/// With cgroup v2, `dirs` has one directory. With cgroup v1, `dirs` has a directory for each hierarchy.
///
/// Waits until the cgroup is empty, for at most a second. Then stops the systemd scope `unit`, and removes the cgroup.
/// Stops the scope first, because systemd might keep the unit if the cgroup were already removed.
pub fn remove(dirs: &[&Path], unit: Option<&Unit>, namespace: &str) {
    let dirs: Vec<&Path> = dirs.iter().copied().filter(|path| is_within(path)).collect();
    let deadline = Instant::now() + CGROUP_EXIT_TIMEOUT;
    // Wait even if all processes were reaped. A reaped process can stay in its cgroup for a short time.
    let empty: Vec<_> = dirs.iter().map(|path| wait_until_empty(path, deadline)).collect();
    unit.into_iter().for_each(crate::resources::cgroup::stop_scope);
    for (path, empty) in dirs.into_iter().zip(empty) {
        if let Err(error) = empty.and_then(|()| remove_until(path, deadline)) {
            tracing::warn!(path = %path.display(), "failed to remove the cgroup: {error}");
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

/// Timeout of the wait until killed processes have left a cgroup.
const CGROUP_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before another attempt to remove a cgroup.
const RETRY_DELAY: Duration = Duration::from_millis(10);

/// Removes a cgroup and the cgroups below it. Tries again until `deadline` if the cgroup is busy. With cgroup v1, a
/// process whose first thread has ended is no longer listed, but its other threads can still be in the cgroup. The
/// kernel has no event for their end.
fn remove_until(path: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        match remove_directories(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(RETRY_DELAY);
            }
            result => return result,
        }
    }
}

/// Removes a cgroup and the cgroups below it.
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

/// Waits until the cgroup and the cgroups below it have no processes.
///
/// The kernel reports a change of `cgroup.events` as POLLPRI (cgroup-v2.rst, "Basic Operations").
fn wait_until_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    let mut events = match File::open(path.join("cgroup.events")) {
        // The cgroup does not exist, or the host uses cgroup v1, which does not have this file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return v1::wait_until_empty(path, deadline),
        other => other?,
    };
    loop {
        let mut text = String::new();
        let read = events.seek(SeekFrom::Start(0)).and_then(|_| events.read_to_string(&mut text));
        match read {
            // The cgroup was removed after `cgroup.events` was opened.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(()),
            other => other?,
        };
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut wanted = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(remaining).unwrap_or(PollTimeout::MAX);
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
