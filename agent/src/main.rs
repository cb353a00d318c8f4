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
    let mut args = std::env::args_os().skip(1);
    match args.next() {
        Some(role) if std::process::id() != 1 => helper::main(&role, args),
        _ => boot::main(),
    }
}
