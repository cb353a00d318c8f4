//! Rate limits of devices: bytes and operations per second, each with a burst.
//!
//! A request beyond the rate waits and never fails. It stays in its virtqueue while it waits. A request that is larger
//! than the burst is served when the bucket is full. Its tokens become a debt, so that later requests wait for longer.
//!
//! A limiter belongs to its device and not to an activation of the device. Therefore a guest cannot get a new burst by
//! resetting the device.

mod bucket;
mod shared;
#[cfg(test)]
mod tests;
mod throttle;

use std::time::{Duration, Instant};

use self::bucket::Bucket;
use crate::config::RateLimit;

pub use self::shared::SharedLimiter;
pub use self::throttle::{Direction, Throttle};

/// Limits the bytes and the operations of one direction of a device.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// Creates a limiter with full buckets. Returns `None` if the limit limits nothing.
    pub fn new(limit: RateLimit, now: Instant) -> Option<Self> {
        let RateLimit { bytes, operations } = limit;
        let bucket = |rate| Bucket::new(rate, now);
        limit.is_limited().then(|| Self { bytes: bytes.map(bucket), operations: operations.map(bucket) })
    }

    /// Admits one operation with this number of bytes, and takes its tokens.
    ///
    /// The bytes of all operations that are admitted within a time t are at most rate × t + burst. If the last of
    /// these operations has more bytes than the burst, its number of bytes takes the burst's place.
    ///
    /// # Errors
    /// The time after which the operation can be admitted.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        self.check(|_| bytes, now)?;
        self.charge(bytes, 1, now);
        Ok(())
    }

    /// Checks whether an operation can be admitted whose number of bytes is known only afterwards, and is at most
    /// `max_bytes`. If the operation is then done, [`RateLimiter::charge`] has to follow.
    ///
    /// # Errors
    /// The time after which the operation can be admitted.
    pub fn admit_up_to(&mut self, max_bytes: u64, now: Instant) -> Result<(), Duration> {
        // Do not wait until the bucket is full. A full bucket loses tokens until the operation is served, and an
        // operation that is much smaller than `max_bytes` does not need them.
        self.check(|burst| max_bytes.min(burst / 2), now)
    }

    /// Takes tokens for something that has already happened.
    pub fn charge(&mut self, bytes: u64, operations: u64, now: Instant) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations, now);
        }
    }

    /// Checks whether there are tokens for one operation. `bytes` returns its number of bytes for a given burst.
    fn check(&mut self, bytes: impl FnOnce(u64) -> u64, now: Instant) -> Result<(), Duration> {
        let for_bytes = self.bytes.as_mut().map(|bucket| bucket.wait_for(bytes(bucket.burst()), now));
        let for_operations = self.operations.as_mut().map(|bucket| bucket.wait_for(1, now));
        match for_bytes.max(for_operations) {
            None | Some(Duration::ZERO) => Ok(()),
            Some(wait) => Err(wait),
        }
    }
}
