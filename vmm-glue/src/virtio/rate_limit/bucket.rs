//! A token bucket. The caller passes the current time, so that a test can choose the time.

use std::time::{Duration, Instant};

use crate::config::Rate;

const NANOS_PER_SECOND: i128 = 1_000_000_000;
/// Minimum time to wait. The wait is shorter only if the bucket reaches half of the burst sooner. Without a minimum, a
/// thread would wake for each operation when the rate is high and the operations are small.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// A token bucket. Tokens are added at the rate, up to the burst.
///
/// The level is an integer, so that rounding errors do not accumulate.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    /// Number of tokens, multiplied by [`NANOS_PER_SECOND`]. If the level is negative, no operation is admitted until
    /// the missing tokens have been added.
    level: i128,
    /// Time up to which tokens have been added.
    filled: Instant,
}

impl Bucket {
    /// Creates a full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: full_level(rate), filled: now }
    }

    /// Returns the maximum number of tokens.
    pub fn burst(&self) -> u64 {
        self.rate.burst
    }

    /// Returns the time to wait until the bucket has `tokens` tokens. [`MIN_WAIT`] can make the wait longer. If
    /// `tokens` exceeds the burst, the wait ends when the bucket is full. Returns zero if the bucket has enough tokens.
    pub fn wait_for(&mut self, tokens: u64, now: Instant) -> Duration {
        self.fill(now);
        match self.time_until(tokens.min(self.rate.burst)) {
            Duration::ZERO => Duration::ZERO,
            needed => needed.max(self.time_until(self.rate.burst / 2).min(MIN_WAIT)),
        }
    }

    fn time_until(&self, tokens: u64) -> Duration {
        let missing = level(tokens) - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = missing.unsigned_abs().div_ceil(u128::from(self.rate.per_second.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes tokens. If the bucket has too few tokens, the level becomes negative.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        self.fill(now);
        self.level = self.level.saturating_sub(level(tokens));
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        let new = elapsed.saturating_mul(u128::from(self.rate.per_second));
        let new = i128::try_from(new).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(new).min(full_level(self.rate));
        self.filled = self.filled.max(now);
    }
}

fn full_level(rate: Rate) -> i128 {
    level(rate.burst)
}

fn level(tokens: u64) -> i128 {
    i128::from(tokens) * NANOS_PER_SECOND
}
