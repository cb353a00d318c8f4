//! Gradual adjustment of the wall clock, which nix lacks.

use std::io;
use std::mem::MaybeUninit;

/// Corrects the wall clock by `micros` gradually, by at most 500 µs in each second. Replaces an earlier correction that
/// has not ended (adjtimex(2), ADJ_OFFSET_SINGLESHOT).
///
/// # Errors
/// EPERM without CAP_SYS_TIME.
pub fn slew(micros: i64) -> io::Result<()> {
    // SAFETY: zero is a valid value of each field of the structure.
    let mut timex: libc::timex = unsafe { MaybeUninit::zeroed().assume_init() };
    timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
    timex.offset = micros;
    // SAFETY: adjtimex reads and writes only the structure, which lives until the call returns.
    if unsafe { libc::adjtimex(&raw mut timex) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
