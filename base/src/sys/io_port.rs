//! Access to x86 I/O ports.

use std::io;

/// Allows or forbids this thread the use of one I/O port (ioperm(2)). Children inherit the permission.
///
/// The permission alone changes no memory: an `in` or `out` instruction needs unsafe code.
///
/// # Errors
/// ENOSYS if the kernel has no ioperm, EPERM without CAP_SYS_RAWIO.
pub fn set_permission(port: u16, allowed: bool) -> io::Result<()> {
    // SAFETY: the call takes no pointers and changes only the thread's I/O permission bitmap.
    match unsafe { libc::ioperm(port.into(), 1, allowed.into()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
