//! Prepares the VMM process: it dies with its parent, leaves no core dump, keeps its heap small and has no blocked
//! signals.

use std::io;

use husk_base::sys::heap;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};

/// Why the process could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// `prctl(PR_SET_PDEATHSIG)` failed.
    #[error("failed to set the parent-death signal")]
    DeathSignal(#[source] io::Error),
    /// `prctl(PR_SET_DUMPABLE)` failed.
    #[error("failed to disable core dumps")]
    Dump(#[source] io::Error),
    /// The signal mask could not be cleared.
    #[error("failed to unblock signals")]
    Signals(#[source] io::Error),
}

/// Prepares the process. It must not have other threads yet.
pub fn prepare() -> Result<(), PrepareError> {
    // A parent that ended before this call causes no signal, but it has closed the control socket, which ends the
    // process as well. The pid of the parent would not tell: a subreaper may adopt orphans, and pid 1 may be the parent.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| PrepareError::DeathSignal(errno.into()))?;
    // A guest can crash the VMM by placing a virtqueue in hot-pluggable memory that is not plugged. The host must not
    // store a core dump of such a crash.
    prctl::set_dumpable(false).map_err(|errno| PrepareError::Dump(errno.into()))?;
    let _ = prctl::set_name(c"husk-vmm");
    heap::keep_small();
    SigSet::empty().thread_set_mask().map_err(|errno| PrepareError::Signals(errno.into()))
}
