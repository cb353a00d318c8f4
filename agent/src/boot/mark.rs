//! Boot marks: one byte written to an I/O port tells the VMM which boot step the guest has reached.

use husk_proto::boot::{Mark, PORT};

/// Writes `mark`. Best effort: without `ioperm` in the kernel, only the mark is lost.
pub fn mark(mark: Mark) {
    // SAFETY: ioperm changes only the calling thread's I/O permission bitmap. Only the VMM's boot mark device uses this
    // port.
    if unsafe { libc::ioperm(libc::c_ulong::from(PORT), 1, 1) } != 0 {
        return;
    }
    // SAFETY: this thread has just been given access to the port; `out` changes neither memory nor stack nor flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") PORT, in("al") mark as u8, options(nomem, nostack, preserves_flags));
    }
    // SAFETY: as above. The permission is revoked because helpers must not inherit it.
    unsafe { libc::ioperm(libc::c_ulong::from(PORT), 1, 0) };
}
