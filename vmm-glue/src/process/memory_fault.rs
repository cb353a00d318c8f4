//! Handles a thread's access to memory that does not exist: reports the access, and ends the process.
//!
//! A guest can cause such an access with the address of a queue or of a buffer. This address can be in hot-pluggable
//! memory that is not plugged, or in a huge page that the host no longer has.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use crate::last_words;

/// Installs the handler for all threads. This handler replaces the standard library's handler, which only names the
/// thread whose stack has overflowed.
pub fn handle() -> io::Result<()> {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        register_signal_handler(signal, on_fault).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    }
    Ok(())
}

extern "C" fn on_fault(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    last_words::end(&"accessed memory that does not exist, perhaps because the guest used memory that is not plugged")
}
