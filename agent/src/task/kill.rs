//! Signals to more than one process: to all of a container's, and the end of an exec with everything that it started.
//!
//! runc kills an exec's first process only, and what that started goes on: a probe that times out leaves a process more
//! in the container each time. A control group of the exec's own would tell what belongs to it, but the container would
//! see it; parents and sessions do not, once a process has left them. So each exec has a time namespace of its own, which
//! everything that it starts inherits and only a process with CAP_SYS_ADMIN can leave; its clocks are the guest's.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::Container;
use super::error::{Fault, unknown};
use super::process::Process;

/// How often what has been forked meanwhile is looked for before the container is frozen for that.
const CHASES: usize = 4;
/// How often at most: what is frozen does not fork.
const ATTEMPTS: usize = 64;

/// The time namespace of an exec.
pub struct Mark {
    /// Held open: its number is not another's meanwhile.
    _held: File,
    number: (u64, u64),
}

impl Mark {
    /// That of the exec `pid` in the container whose first process is `init`. None where the exec has none of its own,
    /// as when it has ended already, or where the container has one.
    pub fn of(pid: i32, init: i32) -> Option<Self> {
        let held = File::open(path(pid)).ok()?;
        let number = number(&held.metadata().ok()?);
        let others = [path(init), path(std::process::id().cast_signed())];
        let own = others.iter().all(|other| fs::metadata(other).is_ok_and(|meta| self::number(&meta) != number));
        own.then_some(Self { _held: held, number })
    }

    fn is_on(&self, pid: i32) -> bool {
        fs::metadata(path(pid)).is_ok_and(|meta| number(&meta) == self.number)
    }
}

fn path(pid: i32) -> PathBuf {
    format!("/proc/{pid}/ns/time").into()
}

fn number(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Signals every process of a container.
///
/// # Errors
/// [`Fault`] when the kernel does not.
pub fn all(container: &Container, signal: i32) -> Result<(), Fault> {
    if signal == libc::SIGKILL {
        return container.cgroup.kill().map_err(unknown("kill"));
    }
    for pid in container.cgroup.pids() {
        // SAFETY: kill takes plain numbers; the group was read just now, and nothing is reaped in between.
        unsafe { libc::kill(pid, signal) };
    }
    Ok(())
}

/// Kills an exec with everything that it started, wherever that has gone.
///
/// # Errors
/// [`Fault`] when its first process has ended already: then the rest stays.
pub async fn exec(container: &Arc<Container>, process: &Arc<Process>) -> Result<(), Fault> {
    process.signal(libc::SIGKILL)?;
    if process.mark.get().is_some() {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let swept = tokio::task::spawn_blocking(move || sweep(&container, &process)).await;
        swept.map_err(unknown("kill"))?.map_err(unknown("kill"))?;
    }
    Ok(())
}

fn sweep(container: &Container, process: &Process) -> io::Result<()> {
    let Some(mark) = process.mark.get() else { return Ok(()) };
    let mut killed = HashSet::new();
    let mut frozen = false;
    let result = (0..ATTEMPTS).find_map(|attempt| {
        // Faster at forking than this at looking: then the container stands still meanwhile, if it does not already.
        if attempt == CHASES && !container.is_paused() {
            frozen = container.cgroup.freeze(true).is_ok();
        }
        match kill_marked(mark, &mut killed) {
            Ok(0) => Some(Ok(())),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        }
    });
    if frozen && !container.is_paused() {
        container.cgroup.freeze(false)?;
    }
    result.unwrap_or_else(|| Err(io::Error::other("what the exec started does not end")))
}

/// Kills what has the mark and was not killed before; returns how many that were.
fn kill_marked(mark: &Mark, killed: &mut HashSet<i32>) -> io::Result<usize> {
    let before = killed.len();
    let names = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    for pid in names.filter_map(|name| name.parse::<i32>().ok()) {
        if killed.contains(&pid) || !mark.is_on(pid) {
            continue;
        }
        // SAFETY: pidfd_open takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else { continue };
        // SAFETY: the kernel has just returned this fd; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Between the look and the descriptor the number may have become another process's.
        if mark.is_on(pid) {
            // SAFETY: without a siginfo this takes plain numbers.
            unsafe {
                libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), libc::SIGKILL, std::ptr::null::<u8>(), 0)
            };
            killed.insert(pid);
        }
    }
    Ok(killed.len() - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_namespace_of_its_own_has_no_mark() {
        let own = std::process::id().cast_signed();
        assert!(Mark::of(own, own).is_none());
        assert!(Mark::of(i32::MAX, own).is_none());
    }
}
