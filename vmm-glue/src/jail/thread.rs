//! Drops the rights that a kind of thread does not need.

use std::io;

use nix::sched::{CloneFlags, unshare};

use super::capabilities;

/// Kind of a thread of the VMM process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread, which serves the control socket.
    Control,
    /// A vCPU.
    Vcpu,
    /// The device loop.
    DeviceLoop,
    /// A worker of the file server.
    FileServer,
    /// The worker of a disk.
    Disk,
    /// The thread that faults in guest memory.
    Prefault,
    /// A thread whose id is a container's PID on the host.
    Pid,
}

/// Error from confining a thread.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} of a thread of kind {kind:?}")]
pub struct ConfineError {
    kind: Kind,
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Confines this thread. The thread must not have served the guest before.
pub fn confine(kind: Kind) -> Result<(), ConfineError> {
    let error = |step| move |source| ConfineError { kind, step, source };
    if kind == Kind::FileServer {
        // For operations on extended attributes, virtiofsd changes the working directory. Therefore, this thread must
        // not share its working directory with other threads.
        unshare(CloneFlags::CLONE_FS).map_err(|errno| error("separate the working directory")(errno.into()))?;
        return capabilities::keep_for_files().map_err(error("reduce the capabilities"));
    }
    capabilities::drop_all().map_err(error("drop the capabilities"))
}
