//! Refuses a system call that the filter does not allow, and logs the call.
//!
//! The kernel sends SIGSYS to the thread instead of making the call. The thread may hold a lock, for example the lock
//! of the allocator. Therefore the handler neither allocates memory nor takes a lock.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use syscalls::Sysno;

/// Maximum number of refused calls that are logged. The lines of all these calls fit into the pipe to the log. If the
/// pipe were full, the main thread could block in its own write, because the main thread also reads the pipe.
const MAX_LOGGED: u32 = 64;

static LOGGED: AtomicU32 = AtomicU32::new(0);

/// Installs the handler for all threads.
pub fn handle() -> io::Result<()> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
    let action = SigAction::new(SigHandler::SigAction(on_violation), flags, SigSet::empty());
    // SAFETY: the handler is async-signal-safe: it formats into a buffer on its stack, makes system calls, and
    // preserves errno.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
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
    if LOGGED.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED {
        log(number, arguments);
    }
    // Set the result of the call.
    if let Some(result) = usize::try_from(libc::REG_RAX).ok().and_then(|index| registers.get_mut(index)) {
        *result = -i64::from(libc::EPERM);
    }
}

/// Writes a line to standard error, which is the pipe to the log. Errors are ignored, because the call is refused in
/// any case.
fn log(number: i64, arguments: [i64; 2]) {
    let mut bytes = [0; 256];
    let mut rest = &mut bytes[..];
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    let [first, second] = arguments;
    let _ = writeln!(
        rest,
        "husk-shim: error: refused system call {number} ({name}) with arguments {first:#x}, {second:#x}, which the \
         shim's seccomp filter does not allow"
    );
    let len = 256 - rest.len();
    // SAFETY: the process never closes standard error.
    let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
    let _ = nix::unistd::write(stderr, bytes.get(..len).unwrap_or_default());
}
