//! Rate limits of devices: bytes and operations per second, each with a burst.
//!
//! A request that exceeds the rate waits in its virtqueue, and does not fail. A request that is larger than the burst
//! is served when the bucket is full. This request takes more tokens than the bucket has. The next request waits until
//! the missing tokens have been added.
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
    /// Creates a limiter with full buckets. Returns `None` if `limit` contains no rate.
    pub fn new(limit: RateLimit, now: Instant) -> Option<Self> {
        let RateLimit { bytes, operations } = limit;
        let bucket = |rate| Bucket::new(rate, now);
        limit.is_limited().then(|| Self { bytes: bytes.map(bucket), operations: operations.map(bucket) })
    }

    /// Admits one operation with this number of bytes, and takes the operation's tokens.
    ///
    /// The operations that are admitted within a time t have at most rate × t + burst bytes. If the last of these
    /// operations is larger than the burst, the maximum is rate × t + the size of the last operation.
    ///
    /// # Errors
    /// If there are too few tokens, returns the time after which the caller can retry.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        self.check(|_| bytes, now)?;
        self.charge(bytes, 1, now);
        Ok(())
    }

    /// Checks whether an operation of at most `max_bytes` bytes can be admitted. The caller does not know the exact
    /// number yet. After the operation, the caller must call [`RateLimiter::charge`].
    ///
    /// # Errors
    /// If there are too few tokens, returns the time after which the caller can retry.
    pub fn admit_up_to(&mut self, max_bytes: u64, now: Instant) -> Result<(), Duration> {
        // Do not wait until the bucket is full. A full bucket gains no tokens until the operation is served. The device
        // would lose this time, and would not reach its rate.
        self.check(|burst| max_bytes.min(burst / 2), now)
    }

    /// Takes tokens for bytes and operations that are already served.
    pub fn charge(&mut self, bytes: u64, operations: u64, now: Instant) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations, now);
        }
    }

    /// Checks whether there are tokens for one operation. `bytes` gets the burst in bytes, and returns the number of
    /// bytes to check.
    fn check(&mut self, bytes: impl FnOnce(u64) -> u64, now: Instant) -> Result<(), Duration> {
        let for_bytes = self.bytes.as_mut().map(|bucket| bucket.wait_for(bytes(bucket.burst()), now));
        let for_operations = self.operations.as_mut().map(|bucket| bucket.wait_for(1, now));
        match for_bytes.max(for_operations) {
            None | Some(Duration::ZERO) => Ok(()),
            Some(wait) => Err(wait),
        }
    }
}
