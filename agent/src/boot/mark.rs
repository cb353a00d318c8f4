//! Boot marks: one byte written to an I/O port tells the VMM which boot step the guest has reached.

use husk_base::sys::port;
use husk_proto::boot::{Mark, PORT};

/// Writes `mark`. Best effort: if the kernel lacks ioperm(2), no mark is written.
pub fn mark(mark: Mark) {
    // Only the VMM's boot mark device uses this port.
    if port::set_permission(PORT, true).is_err() {
        return;
    }
    // SAFETY: this thread has just gained access to the port. `out` changes neither memory nor stack nor flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") PORT, in("al") mark as u8, options(nomem, nostack, preserves_flags));
    }
    // Helpers must not inherit the permission.
    let _ = port::set_permission(PORT, false);
}
