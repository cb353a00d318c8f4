//! Prepares the VMM process: it dies with its parent, leaves no core dump, keeps its heap small and has no blocked
//! signals.

use std::io;

/// Why the process could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// `prctl(PR_SET_PDEATHSIG)` failed.
    #[error("failed to set the parent-death signal")]
    DeathSignal(#[source] io::Error),
    /// `prctl(PR_SET_DUMPABLE)` failed.
    #[error("failed to disable core dumps")]
    Dump(#[source] io::Error),
    /// The parent has ended already.
    #[error("the shim has ended")]
    Orphan,
    /// The signal mask could not be cleared.
    #[error("failed to unblock signals")]
    Signals(#[source] io::Error),
}

/// Minimum size, in bytes, of allocations that malloc maps separately and unmaps when they are freed.
const MMAP_THRESHOLD: libc::c_int = 64 << 10;
/// Maximum free memory, in bytes, that malloc keeps at the end of the heap.
const TRIM_THRESHOLD: libc::c_int = 128 << 10;

/// Prepares the process. It must not have other threads yet.
pub fn prepare() -> Result<(), PrepareError> {
    // SAFETY: `main` calls this before it starts threads, so nothing races with the changed settings. The name is a
    // string that ends with NUL. An all-zero `sigset_t` is valid, and the mask outlives the calls that use it.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(PrepareError::DeathSignal(io::Error::last_os_error()));
        }
        // A parent that ended before the call to prctl causes no signal.
        if libc::getppid() == 1 {
            return Err(PrepareError::Orphan);
        }
        // A guest can crash the VMM: it can place a virtqueue in hot-pluggable memory that is not plugged. The host
        // must not store a core dump for that.
        if libc::prctl(libc::PR_SET_DUMPABLE, 0) != 0 {
            return Err(PrepareError::Dump(io::Error::last_os_error()));
        }
        libc::prctl(libc::PR_SET_NAME, c"husk-vmm".as_ptr());
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0 {
            return Err(PrepareError::Signals(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Ends the process at once, with all its threads. Nothing has to be flushed or freed.
pub fn end(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Reads CLOCK_MONOTONIC, which is the same clock in the shim and in the VMM.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live, writable timespec. CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
