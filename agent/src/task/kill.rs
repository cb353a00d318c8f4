//! Sends signals to several processes: to all processes of a container, or to an exec with all its descendants.
//!
//! runc kills only the first process of an exec, and the descendants keep running. Therefore, with runc, each probe
//! that times out can leak a process in the container. The agent also kills the descendants. Each exec has its own time
//! namespace, which its descendants inherit. The agent identifies the descendants by this namespace.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use husk_base::error::chain;
use husk_base::sync::lock;
use husk_base::sys::pidfd;
use tokio::time::timeout;

use super::Container;
use super::process::{Phase, Process};
use super::time_namespace::TimeNamespace;
use crate::blocking;
use crate::cgroup::Cgroup;
use crate::error::ServiceError;
use crate::reaper::{ProcessExit, now_ns};

/// Maximum time to wait for the exit of killed processes.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit status of a process that SIGKILL has ended.
pub const EXIT_STATUS_KILLED: u32 = 128 + libc::SIGKILL.cast_unsigned();
/// Number of scans for newly forked processes before the container is frozen.
const SCANS_BEFORE_FREEZE: usize = 4;
/// Maximum number of scans. After the freeze, a few scans find all processes. The limit ends the loop if the container
/// cannot be frozen.
const MAX_SCANS: usize = 64;

/// Number of processes that [`all`] signals at a time. Each of them needs an fd.
const BATCH: usize = 64;

/// Signals all processes of a container.
pub async fn all(container: &Arc<Container>, signal: i32) -> Result<(), ServiceError> {
    let container = Arc::clone(container);
    if signal == libc::SIGKILL {
        return blocking::run("kill the processes of the container", move || container.cgroup.kill()).await;
    }
    blocking::run("signal the processes of the container", move || {
        signal_members(&container.cgroup, signal);
        io::Result::Ok(())
    })
    .await
}

fn signal_members(cgroup: &Cgroup, signal: i32) {
    for pids in cgroup.pids().chunks(BATCH) {
        let opened: Vec<_> = pids.iter().filter_map(|pid| Some((pid, pidfd::open(*pid).ok()?))).collect();
        // A process may have exited before its pidfd was opened, and its PID may have been reused. In this case, the
        // second list does not have the PID, unless the new process belongs to the container, too.
        let members: HashSet<i32> = cgroup.pids().into_iter().collect();
        for (_, fd) in opened.iter().filter(|(pid, _)| members.contains(pid)) {
            let _ = pidfd::send_signal(fd.as_fd(), signal);
        }
    }
}

/// Kills the processes that a container has after the exit of its init. Ends after [`KILL_TIMEOUT`] at the latest.
pub async fn rest(container: &Container) {
    // The file is opened first. Otherwise, a write that is delayed could kill a new container with the same id.
    let Ok(mut file) = fs::File::options().write(true).open(container.cgroup.path().join("cgroup.kill")) else {
        return;
    };
    let killing = blocking::run("kill the processes of the container", move || file.write_all(b"1"));
    match timeout(KILL_TIMEOUT, killing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("container {}: {}", container.id, chain(&error)),
        Err(_) => tracing::warn!("container {}: timed out killing its processes", container.id),
    }
}

/// Kills an exec with all its descendants, including those that have left its session or process group.
///
/// An exec that is being started is killed as soon as it has a process. For example, a process in a frozen cgroup does
/// not execute its program. An exec that has not been started ends, and cannot be started later.
///
/// # Errors
/// Fails if the first process of the exec has already exited. In that case the descendants keep running.
pub async fn exec(container: &Arc<Container>, process: &Arc<Process>) -> Result<(), ServiceError> {
    match process.phase() {
        Phase::New => {
            // Close the streams.
            lock(&process.pending).take();
            process.advance(Phase::Stopped(0, ProcessExit { status: EXIT_STATUS_KILLED, at_ns: now_ns() }));
            return Ok(());
        }
        Phase::Starting => process.kill_start(),
        _ => process.signal(libc::SIGKILL)?,
    }
    if process.time_namespace.get().is_some() {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        blocking::run("kill the exec", move || kill_descendants(&container, &process)).await?;
    }
    Ok(())
}

fn kill_descendants(container: &Container, process: &Process) -> io::Result<()> {
    let Some(namespace) = process.time_namespace.get() else { return Ok(()) };
    let mut killed = HashSet::new();
    let mut frozen = false;
    let result = (0..MAX_SCANS).find_map(|scan| {
        // The exec forks faster than the scans find its processes. Therefore freeze the container, because frozen
        // processes cannot fork.
        if scan == SCANS_BEFORE_FREEZE && !container.is_paused() {
            frozen = container.cgroup.freeze(true).is_ok();
        }
        match kill_members(namespace, &mut killed) {
            Ok(0) => Some(Ok(())),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        }
    });
    if frozen {
        container.freezer.thaw_after_kill(&container.cgroup)?;
    }
    result.unwrap_or_else(|| Err(io::Error::other("the exec creates new processes faster than they can be killed")))
}

/// Kills the processes in `namespace` that are not in `killed`, and adds them to `killed`. Returns the number of killed
/// processes.
fn kill_members(namespace: &TimeNamespace, killed: &mut HashSet<i32>) -> io::Result<usize> {
    let before = killed.len();
    let names = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    for pid in names.filter_map(|name| name.parse::<i32>().ok()) {
        if killed.contains(&pid) || !namespace.contains(pid) {
            continue;
        }
        let Ok(fd) = pidfd::open(pid) else { continue };
        // The namespace is checked again, because the PID may have been reused before the pidfd was opened.
        if namespace.contains(pid) {
            let _ = pidfd::send_signal(fd.as_fd(), libc::SIGKILL);
            killed.insert(pid);
        }
    }
    Ok(killed.len() - before)
}
