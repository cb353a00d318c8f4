//! Limiters for a device that the device loop serves. The device loop must not sleep. Therefore, a timer wakes the loop
//! when there are tokens for the next operation.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;

use super::RateLimiter;
use crate::config::RateLimit;
use crate::virtio::queue::TIMER_TOKEN;

/// A direction of a device, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the guest.
    Receive,
    /// From the guest to the host.
    Transmit,
}

/// The limiters of both directions, and their timer. The default limits nothing.
///
/// The device loop serves the device in turns. Each turn begins with [`Throttle::begin_turn`] and ends with
/// [`Throttle::end_turn`].
#[derive(Debug, Default)]
pub struct Throttle {
    limiters: Option<Limiters>,
}

#[derive(Debug)]
struct Limiters {
    receive: Option<RateLimiter>,
    transmit: Option<RateLimiter>,
    timer: TimerFd,
    /// Time at which the turn began. All operations of a turn count as done at this time.
    now: Instant,
    /// The shortest wait among the operations that were not admitted in this turn.
    wait: Option<Duration>,
}

impl Throttle {
    /// Creates limiters with full buckets.
    ///
    /// # Errors
    /// Returns an error if the timer cannot be created.
    pub fn new(receive: RateLimit, transmit: RateLimit) -> io::Result<Self> {
        if !receive.is_limited() && !transmit.is_limited() {
            return Ok(Self::default());
        }
        let now = Instant::now();
        let limiters = Limiters {
            receive: RateLimiter::new(receive, now),
            transmit: RateLimiter::new(transmit, now),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?,
            now,
            wait: None,
        };
        Ok(Self { limiters: Some(limiters) })
    }

    /// Registers the timer with token [`TIMER_TOKEN`]. A device's `init` must call this function.
    pub fn init(&self, ops: &mut EventOps) {
        if let Some(Limiters { timer, .. }) = &self.limiters
            && let Err(error) = ops.add(Events::with_data_raw(timer.as_fd().as_raw_fd(), TIMER_TOKEN, EventSet::IN))
        {
            log::error!("failed to register a timer with the device loop: {error}");
        }
    }

    /// Serves the timer's event. The turn that follows retries the operations that were not admitted.
    pub fn clear_timer(&self) {
        if let Some(Limiters { timer, .. }) = &self.limiters {
            // The read fails with EAGAIN if the timer has expired and was then set again.
            let _ = timer.wait();
        }
    }

    /// Begins a turn.
    pub fn begin_turn(&mut self) {
        if let Some(limiters) = &mut self.limiters {
            limiters.now = Instant::now();
            limiters.wait = None;
        }
    }

    /// Returns whether one operation with this number of bytes is admitted. If so, takes the operation's tokens.
    pub fn admit(&mut self, direction: Direction, bytes: usize) -> bool {
        self.try_admit(direction, |limiter, now| limiter.admit(bytes as u64, now))
    }

    /// Returns whether an operation of at most `max_bytes` bytes is admitted. The caller does not know the exact number
    /// yet. After the operation, the caller must call [`Throttle::charge`].
    pub fn admit_up_to(&mut self, direction: Direction, max_bytes: usize) -> bool {
        self.try_admit(direction, |limiter, now| limiter.admit_up_to(max_bytes as u64, now))
    }

    /// Takes the tokens of an operation that [`Throttle::admit_up_to`] has admitted.
    pub fn charge(&mut self, direction: Direction, bytes: usize) {
        if let Some(limiters) = &mut self.limiters {
            let now = limiters.now;
            if let Some(limiter) = limiters.of(direction) {
                limiter.charge(bytes as u64, 1, now);
            }
        }
    }

    /// Ends a turn. Sets the timer if an operation was not admitted in this turn.
    pub fn end_turn(&mut self) {
        let Some(Limiters { timer, wait: Some(wait), .. }) = &self.limiters else { return };
        if let Err(errno) = timer.set(Expiration::OneShot((*wait).into()), TimerSetTimeFlags::empty()) {
            log::error!("failed to set the timer of a rate limit: {errno}");
        }
    }

    fn try_admit(
        &mut self,
        direction: Direction,
        admit: impl FnOnce(&mut RateLimiter, Instant) -> Result<(), Duration>,
    ) -> bool {
        let Some(limiters) = &mut self.limiters else { return true };
        let now = limiters.now;
        let Some(Err(wait)) = limiters.of(direction).map(|limiter| admit(limiter, now)) else { return true };
        limiters.wait = Some(limiters.wait.map_or(wait, |other| other.min(wait)));
        false
    }
}

impl Limiters {
    fn of(&mut self, direction: Direction) -> Option<&mut RateLimiter> {
        match direction {
            Direction::Receive => self.receive.as_mut(),
            Direction::Transmit => self.transmit.as_mut(),
        }
    }
}
