//! Boot marks: one byte to an I/O port tells the VMM how far the guest has come.

use husk_proto::boot::{Mark, PORT};

/// Writes `mark`; a kernel without `ioperm` loses the mark and nothing else.
pub fn mark(mark: Mark) {
    // SAFETY: ioperm changes only the calling thread's I/O permission bitmap, for one port no device but ours uses.
    if unsafe { libc::ioperm(libc::c_ulong::from(PORT), 1, 1) } != 0 {
        return;
    }
    // SAFETY: the port was just opened to this thread; `out` touches neither memory nor the stack nor the flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") PORT, in("al") mark as u8, options(nomem, nostack, preserves_flags));
    }
    // SAFETY: as above; a helper must not inherit the permission.
    unsafe { libc::ioperm(libc::c_ulong::from(PORT), 1, 0) };
}
