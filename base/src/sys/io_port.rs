//! Access to x86 I/O ports.
//!
//! This file has no unit test, because the kernel of the machine that builds Husk may lack ioperm(2). The agent calls
//! the function at each boot of a guest.

use std::io;

/// Allows or forbids this thread to use one I/O port (ioperm(2)). Children inherit the permission.
///
/// This function is safe, because the permission alone changes no memory. The instructions `in` and `out` need unsafe
/// code.
///
/// # Errors
/// ENOSYS if the kernel lacks ioperm(2), and EPERM without CAP_SYS_RAWIO.
pub fn set_permission(port: u16, allowed: bool) -> io::Result<()> {
    // SAFETY: the call takes no pointers and changes only the thread's I/O permission bitmap.
    match unsafe { libc::ioperm(port.into(), 1, allowed.into()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
