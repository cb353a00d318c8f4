//! Faults of time: steps of the node's clock, and a container that is paused.

use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use super::{Armed, Field, Hold};
use crate::chaos::plan::Fault;
use crate::{KUBERNETES, containerd};

/// Size of a step of the clock.
const STEP: Duration = Duration::from_secs(3600);

/// Steps the clock, or pauses the container.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    let hold = Hold::Short(field.seconds(1.0, 5.0));
    match fault {
        Fault::ClockForward => step(hold, true),
        Fault::ClockBack => step(hold, false),
        Fault::Pause => {
            let id = field.container.ok_or("no container")?.to_owned();
            containerd::pause(KUBERNETES, &id).map_err(|status| status.to_string())?;
            Ok(Armed::new(hold, move || {
                // The container may have been killed.
                let _ = containerd::resume(KUBERNETES, &id);
            }))
        }
        _ => Err(format!("{fault:?} is no fault of time")),
    }
}

fn step(hold: Hold, forward: bool) -> Result<Armed, String> {
    let fail = |error| format!("failed to set the clock: {error}");
    let (before, since) = (Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).map_err(fail)?), Instant::now());
    let stepped = if forward { before + STEP } else { before.saturating_sub(STEP) };
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(stepped)).map_err(fail)?;
    Ok(Armed::new(hold, move || {
        let right = TimeSpec::from(before + since.elapsed());
        clock_settime(ClockId::CLOCK_REALTIME, right).expect("failed to set the clock back");
    }))
}
