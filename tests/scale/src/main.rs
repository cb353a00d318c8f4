//! `husk-scale-shim`: Husk's shim with a stand-in for the VMM and the guest.
//!
//! The shim starts its VMM as `/proc/self/exe` with another `argv[0]`. Therefore the real shim of this program starts
//! this program as its VMM. `cargo xtask scale` runs hundreds of these shims.

mod agent;
mod vmm;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use husk_vmm::client::{ARGV0, CONTROL_FD};

fn main() -> ExitCode {
    if std::env::args_os().next().is_none_or(|name| name != ARGV0) {
        return husk_shim::main();
    }
    // SAFETY: only the shim starts this program under the VMM's name. It passes the control socket as fd `CONTROL_FD`,
    // and nothing else in this process uses this fd.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    match vmm::run(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The shim logs what its VMM writes to standard error.
            eprintln!("the stand-in for the VMM failed: {error}");
            ExitCode::FAILURE
        }
    }
}
