//! Confines a thread to the capabilities that its kind needs.

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
    /// The thread whose PID stands for a container.
    Pid,
}

/// Error of confining a thread.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} of a thread of kind {kind:?}")]
pub struct ConfineError {
    kind: Kind,
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Confines this thread. Must be called before the thread serves the guest.
pub fn confine(kind: Kind) -> Result<(), ConfineError> {
    let error = |step| move |source| ConfineError { kind, step, source };
    if kind == Kind::FileServer {
        // virtiofsd changes the working directory for operations on extended attributes. This must not affect other
        // threads.
        unshare(CloneFlags::CLONE_FS).map_err(|errno| error("separate the working directory")(errno.into()))?;
        return capabilities::keep_for_files().map_err(error("reduce the capabilities"));
    }
    capabilities::drop_all().map_err(error("drop the capabilities"))
}
