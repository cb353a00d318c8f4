//! `husk-agent`: PID 1 of the guest. If re-executed with another `argv[0]`, the program is the helper that starts one
//! process.

#![deny(clippy::indexing_slicing)]

mod async_fd;
mod boot;
mod cgroup;
mod error;
mod events;
mod fatal;
mod helper;
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

/// Runs PID 1 or the helper.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    // The role depends on `argv[0]`, not on the PID, because the first process of a pod's PID namespace also has PID 1.
    // The kernel command line cannot turn PID 1 into a helper, because it sets only the arguments after `argv[0]`.
    let is_helper = args.next().is_some_and(|name| name == helper::ARGV0);
    match args.next() {
        Some(role) if is_helper => helper::main(&role, args),
        _ => boot::main(),
    }
}
