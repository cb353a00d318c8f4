//! The seccomp filter of the shim's threads (seccomp(2)). All threads have the same filter, except those of the host
//! view, whose filter allows fewer calls. The threads share their memory, so an attacker could use the thread with the
//! weakest filter. Each thread for blocking calls may also execute any task of the shim.

mod tables;
mod violation;

use std::io;
use std::os::fd::OwnedFd;

use husk_vmm::config::SeccompMode;
use husk_vmm::jail::seccomp::{FilterError, apply};

pub use tables::{HOST_VIEW, TABLES, rules};

/// A failure to load the filter.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The filter cannot be compiled or loaded.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The handler for violations, or its pipe, cannot be installed.
    #[error("failed to install the SIGSYS handler")]
    Handler(#[source] io::Error),
}

/// Loads the filter for this thread. Threads that this thread starts later inherit the filter. Returns the read end of
/// a pipe, to which the process writes a line for each refused call.
///
/// In mode [`SeccompMode::Enforce`], a call that the filter does not allow fails with EPERM, and is logged. The shim
/// keeps running, because its end would end the pod. The filter may lack a call that the
/// shim needs, because no test has covered the request that causes it. If the
/// thread has blocked SIGSYS, as during posix_spawn(3), the kernel ends the shim.
pub fn load(mode: SeccompMode) -> Result<OwnedFd, LoadError> {
    let lines = violation::handle().map_err(LoadError::Handler)?;
    apply(rules(), mode)?;
    Ok(lines)
}

/// Loads the filter for this thread, which is a thread of the host view. Threads that this thread starts later inherit
/// the filter. [`load`] must have been called before.
pub fn load_for_host_view(mode: SeccompMode) -> Result<(), LoadError> {
    Ok(apply(tables::host_view_rules(), mode)?)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::errno::Errno;
    use nix::sys::prctl;

    use super::*;

    #[test]
    fn forbidden_calls_fail_with_eperm_and_threads_work() {
        std::thread::spawn(|| {
            prctl::set_no_new_privs().unwrap();
            let lines = load(SeccompMode::Enforce).unwrap();
            // SAFETY: the calls take no pointers, or null pointers, and are refused before they do anything.
            let result = |call: libc::c_long| match unsafe { libc::syscall(call, 0, 0, 0, 0, 0) } {
                -1 => Err(Errno::last()),
                _ => Ok(()),
            };
            let forbidden = [
                libc::SYS_ptrace,
                libc::SYS_process_vm_writev,
                libc::SYS_init_module,
                libc::SYS_kexec_load,
                libc::SYS_perf_event_open,
                libc::SYS_userfaultfd,
                libc::SYS_io_uring_setup,
                libc::SYS_keyctl,
                libc::SYS_reboot,
                libc::SYS_execve,
                libc::SYS_open_by_handle_at,
                libc::SYS_pivot_root,
            ];
            for call in forbidden {
                assert_eq!(result(call), Err(Errno::EPERM), "the filter does not refuse system call {call}");
            }
            let mut log = [0; 4096];
            let len = std::fs::File::from(lines).read(&mut log).unwrap();
            let log = String::from_utf8_lossy(&log[..len]);
            assert!(log.starts_with("refused system call 101 (ptrace) with arguments 0x0, 0x0, which"), "{log}");
            assert_eq!(log.lines().count(), forbidden.len(), "{log}");
            // A full pipe does not block the handler.
            for _ in 0..2000 {
                assert_eq!(result(libc::SYS_ptrace), Err(Errno::EPERM));
            }
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() > 0);
        })
        .join()
        .unwrap();
    }
}
