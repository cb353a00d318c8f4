//! Writes boot marks. A boot mark is one byte that tells the VMM which boot step the guest has reached.

use husk_base::sys::io_port;
use husk_proto::boot_mark::{BootMark, PORT};

/// Writes `mark`. Best effort: if the kernel lacks ioperm(2), no mark is written.
pub fn write(mark: BootMark) {
    // Access to `PORT` is harmless, because only the VMM's boot mark device uses the port.
    if io_port::set_permission(PORT, true).is_err() {
        return;
    }
    // SAFETY: this thread has just gained access to the port. `out` changes neither memory nor stack nor flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") PORT, in("al") mark as u8, options(nomem, nostack, preserves_flags));
    }
    // Helpers must not inherit the permission.
    let _ = io_port::set_permission(PORT, false);
}
