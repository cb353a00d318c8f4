//! `husk-agent`: PID 1 of the guest, and, re-executed under another first argument, the helper that starts a process.

mod boot;
mod cgroup;
mod events;
mod helper;
mod io;
mod log;
mod oom;
mod reaper;
mod sandbox;
mod task;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    // The name tells, not the process id: the first process of a pod's own process namespace is 1 there too, and what
    // the kernel passes to its init comes from the command line.
    let helps = args.next().is_some_and(|name| name == helper::ARGV0);
    match args.next() {
        Some(role) if helps => helper::main(&role, args),
        _ => boot::main(),
    }
}
