//! Husk's containerd shim: one process per sandbox. The shim boots the sandbox's VM and serves containerd's Task API.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

mod address;
mod blocking;
pub mod cli;
pub mod confinement;
mod container;
mod daemon;
pub mod error;
mod events;
mod fs_types;
mod hooks;
mod host_view;
pub mod ids;
pub mod launcher;
mod log;
pub mod network;
pub mod oci;
pub mod pod;
mod random;
pub mod resources;
pub mod sandbox;
mod service;
mod stdio;
pub mod systemd;
mod text;
pub mod vm;
mod volumes;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_base::sync::lock;

use cli::Args;
use text::chain;

/// Runs the VMM, or the relay to a socket of the node, if `argv[0]` is its name. Otherwise, runs the action that the
/// command line names.
pub fn main() -> ExitCode {
    let started_ns = sandbox::timeline::now();
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    if name == sandbox::host_sockets::program::ARGV0 {
        return sandbox::host_sockets::program::main(args);
    }
    if name == husk_config::template::ARGV0 {
        return sandbox::template_builder::main(args);
    }
    if name == husk_vmm::client::ARGV0 {
        // SAFETY: only `husk_vmm::client::spawn` starts this program under the VMM's name. `spawn` passes the control
        // socket as fd `CONTROL_FD`. Nothing else in this process uses this fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(husk_vmm::client::CONTROL_FD) });
    }
    match run(args, started_ns) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Write the error to stderr, because containerd's error message contains the output of a failed shim.
            eprintln!("husk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: std::env::ArgsOs, started_ns: u64) -> Result<(), String> {
    let args = args.map(|arg| arg.into_string().map_err(|_| cli::ArgsError::NotUtf8));
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
        other => Err(format!("unknown action {other:?}; containerd runs this program with the action start or delete")),
    }
}
