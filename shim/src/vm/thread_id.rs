//! Translates thread ids from the VMM's PID namespace to the host's PID namespace.

use std::io;
use std::path::Path;

/// Translates `inner`, a thread's id in the VMM's PID namespace, to the thread's id on the host. `vmm` is the VMM's PID
/// on the host.
///
/// Searches only the VMM's threads, because the VMM is not trusted. For example, the VMM might report the id of another
/// process's thread.
///
/// # Errors
/// `NotFound` if the VMM has no such thread. Otherwise, the error of reading `/proc`.
pub fn on_host(vmm: u32, inner: u32) -> io::Result<u32> {
    for entry in std::fs::read_dir(format!("/proc/{vmm}/task"))? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match innermost_id(&entry.path()) {
            Ok(found) if found == Some(inner) => return Ok(id),
            Ok(_) => {}
            // The thread ended during the search.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("the VMM has no thread with id {inner}")))
}

/// Reads a thread's id in the thread's own PID namespace. This id is the last number in the line `NSpid`
/// (proc_pid_status(5)).
fn innermost_id(task: &Path) -> io::Result<Option<u32>> {
    let status = std::fs::read_to_string(task.join("status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(ids.and_then(|ids| ids.split_ascii_whitespace().last()?.parse().ok()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn on_host_finds_only_threads_of_the_process() {
        let own = nix::unistd::gettid().as_raw().cast_unsigned();
        assert_eq!(on_host(std::process::id(), own).unwrap(), own);
        // Process 1 exists, but is not a thread of this process.
        assert_eq!(on_host(std::process::id(), 1).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn on_host_translates_an_id_from_a_pid_namespace() {
        let args = ["--pid", "--fork", "sleep", "1000"];
        let mut unshare = Command::new("unshare").args(args).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let child = loop {
            if let Some(child) = std::fs::read_to_string(&children).unwrap().split_whitespace().next() {
                break child.parse().unwrap();
            }
            std::thread::yield_now();
        };
        assert_eq!(on_host(child, 1).unwrap(), child);
        assert!(on_host(child, child).is_err());
        // Do not rely on `unshare --kill-child`: the child sets this up only after it has appeared in `children`.
        let child = nix::unistd::Pid::from_raw(child.cast_signed());
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
        unshare.wait().unwrap();
    }
}
