//! The shim's side of the control socket: starts the VMM process and sends requests to it.
//!
//! This module does not need an asynchronous runtime. The shim uses [`Spawned::control`] with its own runtime. [`Vmm`]
//! is a blocking client for tests and tools.

mod spawn;
mod vmm;

pub use self::spawn::{Network, SpawnError, SpawnOptions, Spawned, spawn};
pub use self::vmm::{CallError, Vmm};

/// Value of `argv[0]` that makes the binary run [`crate::process::main`].
pub const ARGV0: &str = "husk-vmm";

/// The control socket's fd in the VMM process.
pub const CONTROL_FD: std::os::fd::RawFd = 3;
