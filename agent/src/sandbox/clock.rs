//! Sets and adjusts the guest's wall clock. The shim keeps this clock synchronized with the host's wall clock.

use std::io;

use husk_base::sys::clock::slew;
use nix::sys::time::TimeSpec;
use nix::time::ClockId;

/// Nanoseconds in a second.
const SECOND: i64 = 1_000_000_000;
/// Smallest offset for which the clock is stepped. Smaller offsets are corrected gradually, by 500 µs in each second,
/// so that time does not go back for programs. The node's clock can be slewed faster than this. Therefore the limit is
/// well below 100 ms, by which the clocks may differ.
const STEP_NS: i64 = 50_000_000;

/// How to correct the clock.
#[derive(Debug, PartialEq, Eq)]
enum Correction {
    None,
    /// Gradually, by this number of microseconds.
    Slew(i64),
    /// At once, to this time.
    Step(i64),
}

fn correction(now_ns: i64, offset_ns: i64) -> Correction {
    match offset_ns {
        0 => Correction::None,
        _ if offset_ns.saturating_abs() >= STEP_NS => Correction::Step(now_ns.saturating_add(offset_ns)),
        _ => Correction::Slew(offset_ns / 1000),
    }
}

/// Sets the wall clock to `ns` nanoseconds since the epoch.
pub fn set(ns: i64) -> io::Result<()> {
    ClockId::CLOCK_REALTIME.set_time(TimeSpec::new(ns.div_euclid(SECOND), ns.rem_euclid(SECOND)))?;
    Ok(())
}

/// Adds `offset_ns` to the wall clock. Returns the clock before the correction, in nanoseconds since the epoch.
pub fn adjust(offset_ns: i64) -> io::Result<i64> {
    let now = ClockId::CLOCK_REALTIME.now()?;
    let now_ns = now.tv_sec().saturating_mul(SECOND).saturating_add(now.tv_nsec());
    match correction(now_ns, offset_ns) {
        Correction::None => {}
        Correction::Slew(micros) => slew(micros)?,
        Correction::Step(to) => {
            // An earlier gradual correction must not go on after the step.
            slew(0)?;
            set(to)?;
            tracing::info!(offset_ms = offset_ns / 1_000_000, "stepped the clock");
        }
    }
    Ok(now_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_offsets_step_the_clock_and_small_offsets_slew_it() {
        assert_eq!(correction(5, 0), Correction::None);
        assert_eq!(correction(5, STEP_NS - 1), Correction::Slew(49_999));
        assert_eq!(correction(5, -2_000_000), Correction::Slew(-2000));
        assert_eq!(correction(5, STEP_NS), Correction::Step(5 + STEP_NS));
        assert_eq!(correction(STEP_NS * 2, -STEP_NS), Correction::Step(STEP_NS));
        assert_eq!(correction(i64::MAX, i64::MAX), Correction::Step(i64::MAX));
        assert_eq!(correction(0, i64::MIN), Correction::Step(i64::MIN));
    }
}
