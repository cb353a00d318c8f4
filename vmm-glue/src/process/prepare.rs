//! Prepares the VMM process. The process gets SIGKILL when its parent ends. Core dumps are disabled, the heap is kept
//! small, and all signals except SIGTERM and SIGINT are unblocked.

use std::io;

use husk_base::sys::heap;
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::{memory_fault, termination};

/// Error from preparing the process.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// `prctl(PR_SET_PDEATHSIG)` failed.
    #[error("failed to set the parent-death signal")]
    DeathSignal(#[source] io::Error),
    /// `prctl(PR_SET_DUMPABLE)` failed.
    #[error("failed to disable core dumps")]
    Dump(#[source] io::Error),
    /// The handler of memory faults could not be installed.
    #[error("failed to install the handler of memory faults")]
    Fault(#[source] io::Error),
    /// The signal mask could not be set.
    #[error("failed to set the signal mask")]
    Signals(#[source] io::Error),
}

/// Prepares the process. The process must not have other threads yet.
pub fn prepare() -> Result<(), PrepareError> {
    // If the parent ended before this call, the process does not get the signal. But then the control socket is closed,
    // which also ends the process. Checking the parent's PID would not be reliable, because a subreaper may adopt
    // orphans, and PID 1 may be the real parent.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| PrepareError::DeathSignal(errno.into()))?;
    // A guest can crash the VMM by placing a virtqueue in hot-pluggable memory that is not plugged. The host must not
    // store a core dump of such a crash.
    prctl::set_dumpable(false).map_err(|errno| PrepareError::Dump(errno.into()))?;
    memory_fault::handle().map_err(PrepareError::Fault)?;
    let _ = prctl::set_name(c"husk-vmm");
    heap::keep_small();
    termination::signals().thread_set_mask().map_err(|errno| PrepareError::Signals(errno.into()))
}
