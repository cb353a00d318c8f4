//! Refuses a system call that the filter does not allow, and logs the call.
//!
//! The kernel sends SIGSYS to the thread instead of making the call. The thread may hold a lock, for example the lock
//! of the allocator. Therefore the handler neither allocates memory nor takes a lock.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use syscalls::Sysno;

/// Write end of the pipe to the log. Only this process has the pipe, so that the VMM can neither fill it nor write false
/// lines to it. A write does not block: if the pipe is full, the line is dropped.
static LOG: OnceLock<i32> = OnceLock::new();

/// Installs the handler for all threads. Returns the read end of a pipe. The handler writes a line to this pipe for each
/// refused call.
pub fn handle() -> io::Result<OwnedFd> {
    let (lines, log) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // The write end stays open as long as the process runs, because any thread can use it at any time.
    let _ = LOG.set(log.into_raw_fd());
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
    let action = SigAction::new(SigHandler::SigAction(on_violation), flags, SigSet::empty());
    // SAFETY: the handler is async-signal-safe: it formats into a buffer on its stack, makes system calls, and
    // preserves errno.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(lines)
}

extern "C" fn on_violation(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a pointer to the interrupted thread's context, because the handler was installed with
    // SA_SIGINFO. The context is valid until the handler returns, and nothing else uses it.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register = |index: libc::c_int| usize::try_from(index).ok().and_then(|index| registers.get(index)).copied();
    // The kernel restores the registers of the call: the number and the first arguments (kernel/seccomp.c,
    // `seccomp_trap`).
    let number = register(libc::REG_RAX).unwrap_or(-1);
    let arguments = [libc::REG_RDI, libc::REG_RSI].map(|index| register(index).unwrap_or(0));
    log(number, arguments);
    // Set the result of the call.
    if let Some(result) = usize::try_from(libc::REG_RAX).ok().and_then(|index| registers.get_mut(index)) {
        *result = -i64::from(libc::EPERM);
    }
}

/// Writes a line to the pipe to the log. Errors are ignored, because the call is refused in any case.
fn log(number: i64, arguments: [i64; 2]) {
    let Some(&pipe) = LOG.get() else { return };
    let mut bytes = [0; 256];
    let mut rest = &mut bytes[..];
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    let [first, second] = arguments;
    let _ = writeln!(
        rest,
        "refused system call {number} ({name}) with arguments {first:#x}, {second:#x}, which the \
         shim's seccomp filter does not allow"
    );
    let len = 256 - rest.len();
    // SAFETY: `handle` has given up the ownership of this fd, so that nothing closes it.
    let pipe = unsafe { BorrowedFd::borrow_raw(pipe) };
    let _ = nix::unistd::write(pipe, bytes.get(..len).unwrap_or_default());
}
