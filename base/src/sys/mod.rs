//! Safe wrappers for system calls that nix lacks, or that nix offers only in a form that Husk cannot use.
//!
//! For all other system calls, Husk uses nix's functions directly. The wrappers of this module borrow fds and slices,
//! so that no caller can pass a closed fd or a wrong length.

pub mod bpf;
pub mod capabilities;
pub mod clock;
pub mod fd;
pub mod file_lock;
pub mod heap;
pub mod interface;
pub mod io_port;
pub mod landlock;
pub mod loop_device;
pub mod mount;
pub mod pidfd;
pub mod process;
pub mod random;
pub mod resource;
pub mod scm_rights;
pub mod terminal;
pub mod thread;
pub mod unix_relay;
pub mod user_namespace;
pub mod vsock;
pub mod xattr;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Converts the result of a system call that returns a new fd, or -1.
///
/// # Safety
/// `result` must be the result of a system call that the caller has just made and that returns a new fd. If `result` is
/// an fd, the fd must be open and must have no owner.
unsafe fn new_fd(result: impl TryInto<i32>) -> io::Result<OwnedFd> {
    match result.try_into() {
        // SAFETY: the caller guarantees that the kernel has just returned this fd, and that nothing else owns the fd.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
