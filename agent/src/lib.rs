//! `husk-agent`: PID 1 of the guest. The agent also executes this program with another `argv[0]`, as a helper.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

mod blocking;
mod boot;
mod cgroup;
mod error;
mod events;
mod fatal;
mod helper;
mod host_sockets;
mod id_mappings;
mod io;
mod log;
mod oom;
mod policy;
mod reaper;
mod sandbox;
mod shared_volumes;
mod task;
#[cfg(feature = "testing")]
pub mod testing;
mod vsock;

use std::process::ExitCode;

/// Runs the program as the agent or as a helper.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    // The PID does not distinguish the agent from a helper. A helper that is the first process of a pod's PID namespace
    // also has PID 1 there. The kernel command line cannot turn the agent into a helper, because the command line sets
    // only the arguments after `argv[0]`.
    let is_helper = args.next().is_some_and(|name| name == helper::ARGV0);
    match args.next() {
        Some(role) if is_helper => helper::main(&role, args),
        _ => boot::main(),
    }
}
