//! Husk's containerd shim: one process per pod, which boots the pod's virtual machine and serves containerd's Task API.

pub mod address;
pub mod bundle;
pub mod cli;
pub mod daemon;
pub mod events;
pub mod hooks;
pub mod mirror;
pub mod network;
pub mod pod;
pub mod random;
pub mod sandbox;
pub mod spec;
pub mod stdio;
pub mod systemd;
pub mod task;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cli::Args;

/// The program: the VMM under its own name, else what the command line says.
pub fn main() -> ExitCode {
    let started_ns = sandbox::timeline::now();
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == husk_vmm::client::ARGV0) {
        // SAFETY: under this name the program is only started by `husk_vmm::client::spawn`, which has put the control
        // socket there; nothing else in this process knows of the descriptor.
        husk_vmm::child::main(unsafe { OwnedFd::from_raw_fd(husk_vmm::client::CONTROL_FD) });
    }
    match run(args, started_ns) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd puts what a failed shim prints into its error.
            eprintln!("husk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: std::env::ArgsOs, started_ns: u64) -> Result<(), String> {
    let args = args.map(|arg| arg.into_string().map_err(|_| cli::ArgsError::NotText));
    let args = args.collect::<Result<Vec<_>, _>>().and_then(Args::parse).map_err(|e| chain(&e))?;
    if args.version {
        cli::info::version();
        return Ok(());
    }
    if args.info {
        return cli::info::info().map_err(|e| chain(&e));
    }
    args.check_names().map_err(|e| chain(&e))?;
    match args.action.as_str() {
        "start" => cli::start::start(&args, started_ns).map_err(|e| chain(&e)),
        "delete" => cli::delete::delete(&args).map_err(|e| chain(&e)),
        other => Err(format!("unknown action {other:?}: containerd calls this program with start or delete")),
    }
}

/// An error and all its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors print their cause themselves.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Locks what no panic can leave half done: every holder only reads or assigns.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
