//! Attempts to use up the fds and the pids of the host.

use std::thread;

use syscalls::{Errno, Sysno, syscall};

use crate::Stopped;
use crate::attempts::{AT_FDCWD, text};
use crate::outside::MAX_PIDS;
use crate::payload::{Inside, MAX_FDS};

/// Stack size of a thread in bytes.
const STACK: usize = 32 << 10;

/// Repeats a step until the kernel refuses the step, which it has to do with the errno `refusal`. The attempt succeeds
/// if the process gets more than `bound` of the step's resource.
fn exhaust(
    bound: u64,
    what: &str,
    refusal: Errno,
    mut step: impl FnMut() -> Result<(), Errno>,
) -> Result<String, Stopped> {
    for _ in 0..=bound {
        match step() {
            Ok(()) => {}
            Err(errno) if errno == refusal => return Err(errno.into()),
            Err(errno) => return Err(Stopped::Unclear(format!("expected {refusal}, got {errno}"))),
        }
    }
    Ok(format!("has more than {bound} {what}"))
}

pub fn files(_: &Inside) -> Result<String, Stopped> {
    exhaust(MAX_FDS, "open files", Errno::EMFILE, || {
        // SAFETY: the path is a static text.
        unsafe { syscall!(Sysno::openat, AT_FDCWD, text(c"/inside"), libc::O_RDONLY) }.map(drop)
    })
}

pub fn epoll_instances(_: &Inside) -> Result<String, Stopped> {
    exhaust(MAX_FDS, "epoll instances", Errno::EMFILE, || {
        // SAFETY: the call takes no pointers.
        unsafe { syscall!(Sysno::epoll_create1, 0) }.map(drop)
    })
}

/// Starts threads in the same way as the VMM, because the control thread may start threads.
pub fn threads(_: &Inside) -> Result<String, Stopped> {
    exhaust(MAX_PIDS, "threads", Errno::EAGAIN, || {
        let park = || loop {
            thread::park();
        };
        match thread::Builder::new().stack_size(STACK).spawn(park) {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno::new(error.raw_os_error().unwrap_or_default())),
        }
    })
}

/// Starts processes. They end with the jail's first process, because they are in its PID namespace.
pub fn processes(_: &Inside) -> Result<String, Stopped> {
    exhaust(MAX_PIDS, "processes", Errno::EAGAIN, || {
        // SAFETY: the new process has a copy of this memory, and only makes a system call without pointers.
        unsafe {
            if syscall!(Sysno::clone, libc::SIGCHLD, 0, 0, 0, 0)? == 0 {
                loop {
                    let _ = syscall!(Sysno::pause);
                }
            }
        }
        Ok(())
    })
}
