//! Reports an error to the shim from a signal handler, and ends the process.
//!
//! The interrupted thread may hold a lock, for example the lock of the allocator. Therefore the functions that the
//! handler calls neither allocate memory nor take a lock.

use std::cell::Cell;
use std::fmt::{self, Display, Write};
use std::os::fd::BorrowedFd;
use std::ptr::null_mut;

use husk_base::sys::process::exit_immediately;
use nix::sys::prctl;
use nix::unistd::write;

use crate::client::CONTROL_FD;

/// Length of a thread's name with its NUL byte (TASK_COMM_LEN).
const NAME_LEN: usize = 16;

thread_local! {
    /// Name of this thread, for the signal handler. The variable has neither a lazy initializer nor a destructor.
    /// Therefore, an access to the variable neither allocates memory nor takes a lock.
    static NAME: Cell<[u8; NAME_LEN]> = const { Cell::new([0; NAME_LEN]) };
}

/// Stores the name of this thread, because not every seccomp filter allows the system call that
/// reads the name.
pub fn remember_thread() {
    let mut name = [0; NAME_LEN];
    if let Ok(text) = prctl::get_name() {
        for (to, from) in name.iter_mut().zip(text.to_bytes()) {
            *to = *from;
        }
    }
    NAME.set(name);
}

/// Logs an error of this thread, reports the error to the shim, and ends the process. `deed` is the rest of a sentence
/// that begins with the thread's name.
pub fn end(deed: &dyn Display) -> ! {
    let report = Report { name: NAME.get(), deed };
    let mut line = Buffer::default();
    // Writing fails only if the text is longer than the buffer. In this case, the text is truncated.
    let _ = writeln!(line, "husk-vmm: error: {report}");
    // Errors are ignored, because the process ends in any case.
    // SAFETY: the process never closes standard error.
    let _ = write(unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }, line.bytes());
    send(notice(&report).bytes());
    exit_immediately(1)
}

/// What a thread did.
struct Report<'a> {
    name: [u8; NAME_LEN],
    deed: &'a dyn Display,
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("thread ")?;
        for byte in self.name.iter().take_while(|&&byte| byte != 0) {
            f.write_char(if byte.is_ascii_alphanumeric() || b"-_".contains(byte) { (*byte).into() } else { '?' })?;
        }
        write!(f, " {}", self.deed)
    }
}

/// Returns the message that tells the shim why the VM ends ([`crate::control::Notice::Exited`]).
fn notice(report: &Report<'_>) -> Buffer {
    let mut message = Buffer::default();
    // The report contains no character that JSON has to escape. The buffer is large enough for every report.
    let _ = write!(message, r#"{{"Notice":{{"Exited":{{"reason":{{"Failed":"{report}"}}}}}}}}"#);
    message
}

/// Sends a packet on the control socket, if the socket's buffer is not full.
fn send(packet: &[u8]) {
    let mut iov = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
    let message = libc::msghdr {
        msg_name: null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut iov,
        msg_iovlen: 1,
        msg_control: null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    };
    // SAFETY: sendmsg reads the packet, to which `iov` points. The call writes to no buffer.
    unsafe { libc::sendmsg(CONTROL_FD, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// A buffer for text. The buffer is not on the heap.
struct Buffer {
    bytes: [u8; 384],
    len: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Self { bytes: [0; 384], len: 0 }
    }
}

impl Buffer {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            *self.bytes.get_mut(self.len).ok_or(fmt::Error)? = byte;
            self.len += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ExitReason, Notice, Reply};

    #[test]
    fn notice_is_a_valid_message_of_the_control_socket() {
        let deed = "x".repeat(200);
        let report = Report { name: *b"fs \"\\\x01\xff-_aaaaaa\0", deed: &deed };
        let Reply::Notice(Notice::Exited { reason }) = serde_json::from_slice(notice(&report).bytes()).unwrap() else {
            panic!("the message must be a notice that the VM has ended");
        };
        assert_eq!(reason, ExitReason::Failed(report.to_string()));
    }

    #[test]
    fn report_names_thread() {
        let report = Report { name: *b"vcpu0\0\0\0\0\0\0\0\0\0\0\0", deed: &"did something" };
        assert_eq!(report.to_string(), "thread vcpu0 did something");
    }
}
