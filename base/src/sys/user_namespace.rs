//! Holds a new user namespace open while its id mappings are written.

use std::io;

/// A process in a new user namespace. Dropping the `Holder` kills the process.
#[derive(Debug)]
pub struct Holder(libc::pid_t);

impl Holder {
    /// Creates the user namespace and the process.
    ///
    /// # Errors
    /// The errors of clone(2).
    pub fn new() -> io::Result<Self> {
        // The child has no exit signal. Therefore, a waitpid(-1) call in another thread does not reap the child.
        // SAFETY: without a stack and without CLONE_VM, this clone(2) call is equivalent to fork(2). The child has one
        // thread. The child calls only prctl(2) and pause(2), which take no lock that another thread may have held.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER, 0, 0, 0, 0) };
        match libc::pid_t::try_from(pid) {
            Ok(0) => loop {
                // SAFETY: the child has one thread. The arguments of prctl(2) are plain integers.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            Ok(pid) if pid > 0 => Ok(Self(pid)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the PID of the process, which belongs to the process as long as the `Holder` lives.
    pub fn pid(&self) -> i32 {
        self.0
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: only the second call, waitpid(2), reaps the child. Until then, the PID belongs to the child. The only
        // pointer is the null pointer for the status, which waitpid(2) accepts.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::read_link;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no clone")]
    fn holder_has_its_own_user_namespace_until_it_is_dropped() {
        let holder = Holder::new().expect("this test needs root: it creates a user namespace");
        let path = format!("/proc/{}/ns/user", holder.pid());
        assert_ne!(read_link(&path).unwrap(), read_link("/proc/self/ns/user").unwrap());
        drop(holder);
        assert!(read_link(&path).is_err());
    }
}
