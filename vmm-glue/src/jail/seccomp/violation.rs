//! Reports a system call that a thread's filter does not allow, and ends the process.
//!
//! The kernel sends SIGSYS to the thread instead of executing the call.

use std::fmt;
use std::io;

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use crate::last_words;

/// The handler could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("failed to install the SIGSYS handler")]
pub struct ViolationError(#[source] io::Error);

/// Installs the handler for all threads.
pub fn handle() -> Result<(), ViolationError> {
    register_signal_handler(libc::SIGSYS, on_violation)
        .map_err(|error| ViolationError(io::Error::from_raw_os_error(error.errno())))
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
    last_words::end(&Report { number, arguments })
}

/// A system call that a filter does not allow.
struct Report {
    number: u64,
    arguments: [u64; 3],
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = usize::try_from(self.number).ok().and_then(Sysno::new);
        let [first, second, third] = self.arguments;
        write!(
            f,
            "made system call {} ({}) with arguments {first:#x}, {second:#x}, {third:#x}, which its seccomp filter \
             does not allow",
            self.number,
            call.map_or("unknown", |call| call.name()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_names_call() {
        let report = Report { number: 41, arguments: [2, 1, 0] };
        let text = "made system call 41 (socket) with arguments 0x2, 0x1, 0x0, which its seccomp filter does not allow";
        assert_eq!(report.to_string(), text);
    }
}
