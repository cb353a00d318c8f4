//! How long a worker polls the queue after it has served a request, before it waits for a notification.
//!
//! A driver often sends the next request soon after an answer. If a worker still polls then, the driver need not notify
//! the device, which is an exit of the vCPU, and the worker need not be woken. A worker polls for about as long as these
//! two steps take. Therefore it uses at most twice the CPU time that it would use without polling. The time of a system
//! call says how fast the host is. For example, all steps take 20 times as long on a host that is itself emulated.

use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// Number of measurements. The shortest one counts.
const MEASUREMENTS: usize = 8;
/// The time to poll, as a multiple of the time to write and read an eventfd.
const FACTOR: u32 = 60;
/// Maximum time to poll.
const MAX: Duration = Duration::from_micros(1000);

/// Returns the time to poll. `event` is an eventfd that no other thread uses, and whose count is 0.
pub fn measure(event: &EventFd) -> Duration {
    let measure = || {
        let begin = Instant::now();
        let result = event.write(1).and_then(|()| event.read());
        result.map_or(Duration::ZERO, |_| begin.elapsed())
    };
    let shortest = (0..MEASUREMENTS).map(|_| measure()).min().unwrap_or_default();
    (shortest * FACTOR).min(MAX)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn time_is_bounded_and_the_event_stays_unset() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let time = measure(&event);
        assert!(time > Duration::ZERO && time <= MAX, "{time:?}");
        assert!(event.read().is_err());
    }
}
