//! `husk-agent`: PID 1 of the guest. Re-executed with another `argv[0]`, it is the helper that starts one process.

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
mod reaper;
mod sandbox;
mod shared_volumes;
mod task;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    // The role depends on `argv[0]`, not on the PID: the first process of a pod's PID namespace is PID 1 there too.
    // The kernel command line can only set the arguments of init that follow `argv[0]`.
    let is_helper = args.next().is_some_and(|name| name == helper::ARGV0);
    match args.next() {
        Some(role) if is_helper => helper::main(&role, args),
        _ => boot::main(),
    }
}
