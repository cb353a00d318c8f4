//! What the VMM process does to itself: dies with its parent, leaves no core dump, keeps its heap small, has no
//! signals blocked.

use std::io;

/// Why the process could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// `prctl` failed.
    #[error("prctl(PR_SET_PDEATHSIG) failed")]
    DeathSignal(#[source] io::Error),
    /// `prctl` failed.
    #[error("prctl(PR_SET_DUMPABLE) failed")]
    Dump(#[source] io::Error),
    /// It is too late already.
    #[error("the shim is gone")]
    Orphan,
    /// The signal mask could not be cleared.
    #[error("cannot unblock signals")]
    Signals(#[source] io::Error),
}

/// Allocations from this size on get pages of their own and give them back when freed.
const MMAP_THRESHOLD: libc::c_int = 64 << 10;
/// Free memory at the heap's end that is kept.
const TRIM_THRESHOLD: libc::c_int = 128 << 10;

/// Prepares the process, before it has threads.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare() -> Result<(), PrepareError> {
    // SAFETY: prctl, mallopt and signal masks of a process with one thread; the mask lives until the calls return.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(PrepareError::DeathSignal(io::Error::last_os_error()));
        }
        // One that died before the call sends nothing.
        if libc::getppid() == 1 {
            return Err(PrepareError::Orphan);
        }
        // A guest can have the VMM crash, by a queue in memory that it has not plugged in: the host stores no dump of it.
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

/// Ends the process at once, with all its threads: nothing is left to flush or to free.
pub fn end(code: i32) -> ! {
    // SAFETY: _exit has no conditions.
    unsafe { libc::_exit(code) }
}

/// CLOCK_MONOTONIC, which shim and VMM share.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure lives until the call returns; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
