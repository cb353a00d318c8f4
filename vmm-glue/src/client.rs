//! The shim's side: starts the VMM process and talks to it. No asynchronous runtime: the shim wraps [`Spawned::control`]
//! in its own; [`Vmm`] is the blocking client of tests and tools.

mod spawn;
mod vmm;

pub use self::spawn::{Network, SpawnError, SpawnOptions, Spawned, spawn};
pub use self::vmm::{CallError, Vmm};

/// `argv[0]` by which the binary knows that it is to run [`crate::child::main`].
pub const ARGV0: &str = "husk-vmm";

/// The control socket's descriptor in the VMM process.
pub const CONTROL_FD: std::os::fd::RawFd = 3;
