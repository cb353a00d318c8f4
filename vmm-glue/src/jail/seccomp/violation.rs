//! Reports a system call that a thread's filter does not allow, and ends the process.
//!
//! The kernel sends SIGSYS to the thread instead of executing the call. The thread may hold a lock, for example the
//! lock of the allocator. Therefore the handler neither allocates memory nor takes a lock.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::null_mut;

use husk_base::sys::process::exit_immediately;
use nix::sys::prctl;
use nix::unistd::write;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use crate::client::CONTROL_FD;

/// The handler could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("failed to install the SIGSYS handler")]
pub struct ViolationError(#[source] io::Error);

/// Length of a thread's name with its NUL byte (TASK_COMM_LEN).
const NAME_LEN: usize = 16;

thread_local! {
    /// Name of this thread, for the signal handler. The handler may access this variable, because the variable has
    /// neither a lazy initializer nor a destructor.
    static NAME: Cell<[u8; NAME_LEN]> = const { Cell::new([0; NAME_LEN]) };
}

/// Installs the handler for all threads.
pub fn handle() -> Result<(), ViolationError> {
    register_signal_handler(libc::SIGSYS, on_violation)
        .map_err(|error| ViolationError(io::Error::from_raw_os_error(error.errno())))
}

/// Stores the name of this thread, because the filter may not allow the call that reads the name.
pub fn remember_thread() {
    let mut name = [0; NAME_LEN];
    if let Ok(text) = prctl::get_name() {
        for (to, from) in name.iter_mut().zip(text.to_bytes()) {
            *to = *from;
        }
    }
    NAME.set(name);
}

extern "C" fn on_violation(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let register = |index: libc::c_int| {
        // SAFETY: the kernel passes a pointer to the interrupted thread's context, because the handler was installed
        // with SA_SIGINFO. The context is valid until the handler returns.
        let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        usize::try_from(index).ok().and_then(|index| registers.get(index)).map_or(0, |&value| value.cast_unsigned())
    };
    // Before the kernel sends the signal, it restores the registers that hold the number and the arguments of the call
    // (kernel/seccomp.c, `__seccomp_filter`).
    let number = register(libc::REG_RAX);
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(register);
    let report = Report { name: NAME.get(), number, arguments };
    let mut line = Buffer::default();
    // Writing fails only if the text is longer than the buffer. Then the text is truncated.
    let _ = writeln!(line, "husk-vmm: error: {report}");
    // Errors are ignored, because the process ends in any case.
    // SAFETY: the process never closes standard error.
    let _ = write(unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }, line.bytes());
    send(notice(&report).bytes());
    exit_immediately(1)
}

/// Returns the message that tells the shim why the VM ends ([`crate::control::Notice::Exited`]).
fn notice(report: &Report) -> Buffer {
    let mut message = Buffer::default();
    // The report contains no character that JSON escapes. The buffer is large enough for every report.
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
    // SAFETY: sendmsg reads the packet, to which `iov` points. It writes to none of the buffers.
    unsafe { libc::sendmsg(CONTROL_FD, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// A system call that a filter does not allow.
struct Report {
    name: [u8; NAME_LEN],
    number: u64,
    arguments: [u64; 3],
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("thread ")?;
        for byte in self.name.iter().take_while(|&&byte| byte != 0) {
            f.write_char(if byte.is_ascii_alphanumeric() || b"-_".contains(byte) { (*byte).into() } else { '?' })?;
        }
        let call = usize::try_from(self.number).ok().and_then(Sysno::new);
        let [first, second, third] = self.arguments;
        write!(
            f,
            " made system call {} ({}) with arguments {first:#x}, {second:#x}, {third:#x}, which its seccomp filter \
             does not allow",
            self.number,
            call.map_or("unknown", |call| call.name()),
        )
    }
}

/// A buffer for text that does not use the heap.
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
    fn notice_is_a_message_of_the_control_socket() {
        let report = Report { name: *b"fs \"\\\x01\xff-_aaaaaa\0", number: u64::MAX, arguments: [u64::MAX; 3] };
        let Reply::Notice(Notice::Exited { reason }) = serde_json::from_slice(notice(&report).bytes()).unwrap() else {
            panic!("the message is not an Exited notice");
        };
        assert_eq!(reason, ExitReason::Failed(report.to_string()));
    }

    #[test]
    fn report_names_thread_and_call() {
        let report = Report { name: *b"vcpu0\0\0\0\0\0\0\0\0\0\0\0", number: 41, arguments: [2, 1, 0] };
        let text = "thread vcpu0 made system call 41 (socket) with arguments 0x2, 0x1, 0x0, which its seccomp filter \
                    does not allow";
        assert_eq!(report.to_string(), text);
    }
}
