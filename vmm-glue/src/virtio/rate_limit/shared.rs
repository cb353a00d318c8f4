//! A limiter for devices whose worker threads serve requests.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use husk_base::sync::lock;

use super::RateLimiter;
use crate::config::RateLimit;

/// A limiter that threads share, or no limit. Clones share the same buckets.
#[derive(Debug, Clone, Default)]
pub struct SharedLimiter {
    limiter: Option<Arc<Mutex<RateLimiter>>>,
    limits_bytes: bool,
}

impl SharedLimiter {
    /// Creates a limiter with full buckets.
    pub fn new(limit: RateLimit) -> Self {
        let limiter = RateLimiter::new(limit, Instant::now()).map(|limiter| Arc::new(Mutex::new(limiter)));
        Self { limiter, limits_bytes: limit.bytes.is_some() }
    }

    /// Returns whether the number of bytes is limited.
    pub fn limits_bytes(&self) -> bool {
        self.limits_bytes
    }

    /// Admits one operation, as [`RateLimiter::admit`] does. Without a limit, `bytes` is not called.
    ///
    /// # Errors
    /// If there are too few tokens, returns the time after which the caller can retry.
    pub fn admit(&self, bytes: impl FnOnce() -> u64) -> Result<(), Duration> {
        self.limiter.as_ref().map_or(Ok(()), |limiter| lock(limiter).admit(bytes(), Instant::now()))
    }

    /// Takes tokens for bytes that the VMM reads or writes in addition to the bytes of an admitted request.
    pub fn charge_bytes(&self, bytes: u64) {
        if let Some(limiter) = &self.limiter {
            lock(limiter).charge(bytes, 0, Instant::now());
        }
    }
}
