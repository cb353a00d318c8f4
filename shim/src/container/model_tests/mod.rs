//! Model test of the shim: requests whose callers disconnect, and faults of the guest, the VMM and containerd, at every
//! step of every request.
//!
//! The shim, its services and its clients are the real ones ([`model`]). Each container is created with real mounts.
//! Therefore, these tests need root, and each test runs in a process and a mount namespace of its own.

mod agent;
mod check;
mod execs;
mod exhaustive;
mod failed_launch;
mod model;
mod process;
mod random;
mod requests;
mod vmm;

pub use agent::Answer;
pub use execs::{LAST_EXEC, begin_exec, start_more_execs_than_turns};
pub use model::{BUDGET, Model, SANDBOX, within};
pub use requests::create;
