//! Keeps the guest's wall clock synchronized with the host's wall clock.
//!
//! The guest's kernel measures time with the CPU's time-stamp counter. Therefore the guest's clock does not follow
//! NTP's corrections of the host's clock, nor a step of the host's clock. The shim compares both clocks at intervals,
//! and whenever the host's clock has been stepped or slewed. Only the wall clock is corrected. The guest's monotonic
//! clock never goes back.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

use husk_base::async_fd::register;
use husk_proto::agent::AdjustClockRequest;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::ClockId;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::vm::agent::{Agent, timeouts, within};
use crate::vm::vmm::Vmm;

/// Time from the end of the boot, which sets the guest's clock, to the first comparison. A pod that ends earlier needs
/// no comparison.
const FIRST_INTERVAL: Duration = Duration::from_secs(10);
/// Interval between two comparisons. A clock that is 100 ppm fast gains 30 ms in this time.
const INTERVAL: Duration = Duration::from_secs(300);
/// Interval between two checks whether the host's clock has been slewed. The kernel reports only steps of its clock. A
/// check makes two calls of the vDSO, and no request to the guest.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Slew of the host's clock, in nanoseconds since the last comparison, that leads to the next comparison.
const MAX_SLEW_NS: i64 = 20_000_000;
/// Interval between two checks while the host's clock is slewed fast. chrony slews by up to 8 % by default.
const FAST_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Interval after a comparison that failed, or that took so long that it was not accurate.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Error of a measurement that is accurate enough.
const MAX_ERROR: Duration = Duration::from_millis(50);
/// Offset that is not worth a correction.
const TOLERANCE: Duration = Duration::from_millis(1);
/// Number of measurements for one comparison. The fastest one is the most accurate one.
const ATTEMPTS: usize = 3;

/// Starts to correct the guest's clock. Stops when the VM ends.
pub fn start(agent: Agent, vmm: Vmm) {
    tokio::spawn(async move {
        tokio::select! {
            result = follow(&agent) => if let Err(error) = result {
                tracing::warn!(%error, "failed to watch the host's clock; the guest's clock does not follow it");
            },
            _ = vmm.wait() => {}
        }
    });
}

async fn follow(agent: &Agent) -> io::Result<()> {
    let steps = Steps::new()?;
    let mut schedule = Schedule::new(Instant::now(), host_offset()?);
    loop {
        let stepped = tokio::select! {
            result = steps.wait() => {
                result?;
                tracing::info!("the host's clock was stepped");
                true
            }
            () = tokio::time::sleep(schedule.next_check(Instant::now())) => false,
        };
        let offset_ns = host_offset()?;
        if schedule.is_due(Instant::now(), offset_ns) || stepped {
            let accurate = compare(agent).await;
            schedule.compared(Instant::now(), offset_ns, accurate);
        }
    }
}

/// Returns how far the host's wall clock is ahead of CLOCK_MONOTONIC_RAW, in nanoseconds. NTP corrects the wall clock
/// only. The other clock runs at the rate of the time-stamp counter, as the guest's clock does.
fn host_offset() -> io::Result<i64> {
    let read = |clock: ClockId| -> io::Result<i64> {
        let time = clock.now()?;
        Ok(time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec()))
    };
    Ok(read(ClockId::CLOCK_REALTIME)?.saturating_sub(read(ClockId::CLOCK_MONOTONIC_RAW)?))
}

/// Decides when the clocks are compared.
struct Schedule {
    /// Time of the next comparison.
    due: Instant,
    /// [`host_offset`] at the last comparison, and at the last check.
    compared_ns: i64,
    checked_ns: i64,
    check_interval: Duration,
}

impl Schedule {
    fn new(now: Instant, offset_ns: i64) -> Self {
        let due = now + FIRST_INTERVAL;
        Self { due, compared_ns: offset_ns, checked_ns: offset_ns, check_interval: CHECK_INTERVAL }
    }

    /// Returns the time until the next check.
    fn next_check(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now).min(self.check_interval)
    }

    /// Checks the host's clock. Returns whether the clocks must be compared now.
    fn is_due(&mut self, now: Instant, offset_ns: i64) -> bool {
        let is_fast = offset_ns.abs_diff(self.checked_ns) > MAX_SLEW_NS.unsigned_abs() / 10;
        self.check_interval = if is_fast { FAST_CHECK_INTERVAL } else { CHECK_INTERVAL };
        self.checked_ns = offset_ns;
        now >= self.due || offset_ns.abs_diff(self.compared_ns) > MAX_SLEW_NS.unsigned_abs()
    }

    /// Records a comparison that began when [`host_offset`] was `offset_ns`.
    fn compared(&mut self, now: Instant, offset_ns: i64, accurate: bool) {
        self.compared_ns = offset_ns;
        self.due = now + if accurate { INTERVAL } else { RETRY_INTERVAL };
    }
}

/// A measurement of the difference between the two clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Measurement {
    /// Nanoseconds that the guest's clock is behind the host's clock.
    offset_ns: i64,
    /// Maximum error of `offset_ns`.
    error_ns: i64,
}

impl Measurement {
    /// Returns the measurement from the guest's answer. `begin_ns` is the host's clock before the request, and `took`
    /// is the time until the answer. The agent read `guest_ns` from its clock at some time between the request and the
    /// answer. Therefore the error is at most half of `took`.
    fn new(begin_ns: i64, took: Duration, guest_ns: i64) -> Self {
        let half = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
        Self { offset_ns: begin_ns.saturating_add(half).saturating_sub(guest_ns), error_ns: half }
    }

    /// Returns whether the measurement says enough about the offset.
    fn is_accurate(self) -> bool {
        u128::try_from(self.error_ns).is_ok_and(|error_ns| error_ns <= MAX_ERROR.as_nanos())
    }

    /// Returns the correction, or 0 if the measured offset may be an error of the measurement.
    fn correction(self) -> i64 {
        let tolerance = i64::try_from(TOLERANCE.as_nanos()).unwrap_or(i64::MAX).max(self.error_ns);
        if self.offset_ns.saturating_abs() > tolerance { self.offset_ns } else { 0 }
    }
}

/// Compares both clocks, and corrects the guest's clock. Returns whether this succeeded with an accurate measurement.
async fn compare(agent: &Agent) -> bool {
    let mut best: Option<Measurement> = None;
    for _ in 0..ATTEMPTS {
        match measure(agent, 0).await {
            Ok(measured) if best.is_none_or(|best| measured.error_ns < best.error_ns) => best = Some(measured),
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "failed to read the guest's clock");
                return false;
            }
        }
    }
    let Some(best) = best else { return false };
    let correction = best.correction();
    if correction == 0 {
        return best.is_accurate();
    }
    tracing::debug!(offset_us = correction / 1000, "correcting the guest's clock");
    if let Err(error) = measure(agent, correction).await {
        tracing::warn!(%error, "failed to correct the guest's clock");
        return false;
    }
    best.is_accurate()
}

/// Corrects the guest's clock by `correction_ns`, and measures the offset before this correction.
async fn measure(agent: &Agent, correction_ns: i64) -> ttrpc::Result<Measurement> {
    let request = AdjustClockRequest { offset_ns: correction_ns, ..Default::default() };
    let (clock, begin) = (SystemTime::now(), Instant::now());
    let response = agent.sandbox.adjust_clock(within(timeouts::QUICK), &request).await?;
    let took = begin.elapsed();
    let since_epoch = clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let begin_ns = i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX);
    Ok(Measurement::new(begin_ns, took, response.clock_ns))
}

/// Notices steps of the host's wall clock.
struct Steps(AsyncFd<OwnedFd>);

impl Steps {
    fn new() -> io::Result<Self> {
        let timer = TimerFd::new(timerfd::ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        // The timer never expires. If the clock is stepped, the kernel cancels the timer, and read fails with ECANCELED
        // (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET).
        let never = Expiration::OneShot(TimeSpec::new(i64::MAX / 1_000_000_000, 0));
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        timer.set(never, flags)?;
        Ok(Self(register(OwnedFd::from(timer), Interest::READABLE)?))
    }

    async fn wait(&self) -> io::Result<()> {
        let read = |timer: &OwnedFd| match nix::unistd::read(timer, &mut [0; 8]) {
            Ok(_) | Err(Errno::ECANCELED) => Ok(()),
            Err(error) => Err(error.into()),
        };
        self.0.async_io(Interest::READABLE, read).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn correction_is_zero_within_the_error_of_the_measurement() {
        // The guest is 20 ms behind, but the answer took 100 ms.
        let slow = Measurement::new(1000 * MS, Duration::from_millis(100), 1030 * MS);
        assert_eq!(slow, Measurement { offset_ns: 20 * MS, error_ns: 50 * MS });
        assert_eq!(slow.correction(), 0);
        assert!(slow.is_accurate());
        assert!(!Measurement::new(0, Duration::from_millis(102), 0).is_accurate());
        let fast = Measurement::new(1000 * MS, Duration::from_millis(2), 981 * MS);
        assert_eq!(fast.correction(), 20 * MS);
        let ahead = Measurement::new(1000 * MS, Duration::from_millis(2), 3_601_001 * MS);
        assert_eq!(ahead.correction(), -3_600_000 * MS);
        let equal = Measurement::new(1000 * MS, Duration::ZERO, 1000 * MS - MS / 2);
        assert_eq!(equal.correction(), 0);
    }

    #[test]
    fn clock_of_a_hostile_guest_causes_no_overflow() {
        for guest in [i64::MIN, 0, i64::MAX] {
            for took in [Duration::ZERO, Duration::MAX] {
                Measurement::new(i64::MAX, took, guest).correction();
            }
        }
    }

    #[test]
    fn slew_of_the_host_clock_leads_to_a_comparison() {
        let begin = Instant::now();
        let at = |secs| begin + Duration::from_secs(secs);
        let mut schedule = Schedule::new(begin, 0);
        assert_eq!(schedule.next_check(begin), FIRST_INTERVAL);
        assert!(schedule.is_due(at(10), 0));
        schedule.compared(at(10), 0, true);
        assert_eq!(schedule.next_check(at(10)), CHECK_INTERVAL);
        // 100 ppm, as NTP may correct an oscillator.
        assert!(!schedule.is_due(at(20), MS));
        assert_eq!(schedule.next_check(at(20)), CHECK_INTERVAL);
        assert!(schedule.is_due(at(310), 20 * MS));
        schedule.compared(at(310), 20 * MS, true);
        // 0.5 % forward, then 8 % back.
        assert!(!schedule.is_due(at(311), 25 * MS));
        assert_eq!(schedule.next_check(at(311)), FAST_CHECK_INTERVAL);
        assert!(schedule.is_due(at(312), -55 * MS));
        schedule.compared(at(312), -55 * MS, false);
        assert!(!schedule.is_due(at(321), -55 * MS));
        assert_eq!(schedule.next_check(at(321)), Duration::from_secs(1));
        assert!(schedule.is_due(at(322), -55 * MS));
    }

    #[test]
    fn extreme_times_of_the_host_cause_no_overflow() {
        let now = Instant::now();
        let mut schedule = Schedule::new(now, i64::MIN);
        assert!(schedule.is_due(now, i64::MAX));
        schedule.compared(now, i64::MAX, false);
    }

    #[tokio::test]
    async fn steps_waits_while_the_clock_is_not_stepped() {
        let steps = Steps::new().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), steps.wait()).await.is_err());
    }
}
