//! Sends signals to several processes: to all processes of a container, or to an exec with all its descendants.
//!
//! runc kills only the first process of an exec, and the descendants keep running. Therefore, with runc, each probe
//! that times out can leak a process in the container. The agent also kills the descendants. Each exec has its own time
//! namespace, which its descendants inherit. The agent identifies the descendants by this namespace.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use husk_base::sys::pidfd;

use super::Container;
use super::process::Process;
use super::time_namespace::TimeNamespace;
use crate::error::{ServiceError, failed};

/// Number of scans for newly forked processes before the container is frozen.
const SCANS_BEFORE_FREEZE: usize = 4;
/// Maximum number of scans. After the freeze, a few scans find all processes. The limit ends the loop if the container
/// cannot be frozen.
const MAX_SCANS: usize = 64;

/// Signals all processes of a container.
pub fn all(container: &Container, signal: i32) -> Result<(), ServiceError> {
    if signal == libc::SIGKILL {
        return container.cgroup.kill().map_err(failed("kill the processes of the container"));
    }
    for pid in container.cgroup.pids() {
        // The agent's only async thread reaps no child between reading the PIDs and sending the signals. Therefore the
        // PIDs of the agent's children, such as the container's init, cannot have been reused. The PID of another
        // process can be reused, because that process has another parent, which can reap it at any time.
        let _ = husk_base::sys::process::kill(pid, signal);
    }
    Ok(())
}

/// Kills an exec with all its descendants, including those that have left its session or process group.
///
/// # Errors
/// Fails if the first process of the exec has already exited. In that case the descendants keep running.
pub async fn exec(container: &Arc<Container>, process: &Arc<Process>) -> Result<(), ServiceError> {
    process.signal(libc::SIGKILL)?;
    if process.time_namespace.get().is_some() {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let killed = tokio::task::spawn_blocking(move || kill_descendants(&container, &process)).await;
        killed.map_err(failed("kill the exec"))?.map_err(failed("kill the exec"))?;
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
    if frozen && !container.is_paused() {
        container.cgroup.freeze(false)?;
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
