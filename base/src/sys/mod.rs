//! Safe wrappers for system calls that nix does not have, or has in a form that Husk cannot use.
//!
//! Where nix has a call, its function is used directly. A wrapper here is safe: it borrows fds and slices, so that no
//! caller can pass a closed fd or a wrong length.

pub mod bpf;
pub mod capabilities;
pub mod fd;
pub mod heap;
pub mod interface;
pub mod io_port;
pub mod mount;
pub mod pidfd;
pub mod process;
pub mod scm_rights;
pub mod terminal;
pub mod vsock;
pub mod xattr;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Converts the result of a system call that returns a new fd, or -1.
///
/// # Safety
/// `result` is the result of such a call, made by the caller just now: if it is an fd, it is open and has no owner.
unsafe fn new_fd(result: impl TryInto<i32>) -> io::Result<OwnedFd> {
    match result.try_into() {
        // SAFETY: the kernel has just returned this fd, and nothing else owns it, as the caller guarantees.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
