//! Signals for one thread of this process. nix's `pthread_kill` does not send real-time signals.

use std::io;

use nix::unistd::{Pid, getpid};

/// Sends a signal to a thread of this process (tgkill(2)). The caller ensures that the thread has not ended. Otherwise
/// the signal can reach another thread.
///
/// # Errors
/// The errors of tgkill(2).
pub fn send_signal(thread: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: the call takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, getpid().as_raw(), thread.as_raw(), signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri lacks tgkill")]
    fn signal_zero_finds_a_thread_of_this_process_only() {
        send_signal(nix::unistd::gettid(), 0).unwrap();
        let error = send_signal(Pid::from_raw(1), 0).map_err(|error| error.raw_os_error());
        assert!(std::process::id() == 1 || error == Err(Some(libc::ESRCH)));
    }
}
