//! flock(2). nix has this call only as a type that owns the file (`Flock`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// An operation of flock(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flock {
    /// Acquires a shared lock, or converts the lock to a shared lock.
    Shared,
    /// Acquires an exclusive lock, or converts the lock to an exclusive lock.
    Exclusive,
    /// Releases the lock.
    Unlock,
}

/// Changes the lock of an open file description. If another description has a conflicting lock, the call waits if
/// `wait` is set, and otherwise fails with EWOULDBLOCK.
///
/// # Errors
/// The errors of flock(2).
pub fn flock(file: impl AsFd, operation: Flock, wait: bool) -> io::Result<()> {
    let operation = match operation {
        Flock::Shared => libc::LOCK_SH,
        Flock::Exclusive => libc::LOCK_EX,
        Flock::Unlock => libc::LOCK_UN,
    };
    let operation = if wait { operation } else { operation | libc::LOCK_NB };
    // SAFETY: the call takes no pointers, and `file` keeps its fd open.
    let result = unsafe { libc::flock(file.as_fd().as_raw_fd(), operation) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks flock")]
    fn exclusive_lock_excludes_other_descriptions() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (file.reopen().unwrap(), file.reopen().unwrap());
        flock(&first, Flock::Shared, true).unwrap();
        flock(&second, Flock::Shared, false).unwrap();
        let error = flock(&second, Flock::Exclusive, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        flock(&first, Flock::Unlock, false).unwrap();
        flock(&second, Flock::Exclusive, false).unwrap();
        drop(second);
        flock(&first, Flock::Exclusive, false).unwrap();
    }
}
