//! The rate at which a pod can connect to sockets of the node.
//!
//! The relaying process is in the pod's cgroup. The lookup of the socket and the fork of the launcher are not. Without a
//! limit, a pod could use more CPU of the node than its cgroup allows.

use std::time::{Duration, Instant};

/// Number of connections that a pod can make at once.
const BURST: u32 = 64;
/// Time until the pod can make another connection.
const INTERVAL: Duration = Duration::from_millis(50);

/// A token bucket. Each connection takes a token. An interval adds one.
#[derive(Debug, Default)]
pub struct Rate {
    /// When the bucket is full again. `None` means that it has always been full.
    full_at: Option<Instant>,
}

impl Rate {
    /// Takes a token. Returns the time until there is this token. Returns `None`, and takes no token, if this time
    /// exceeds `limit`.
    pub fn reserve(&mut self, now: Instant, limit: Duration) -> Option<Duration> {
        let full_at = self.full_at.map_or(now, |full_at| full_at.max(now)) + INTERVAL;
        let wait = full_at.saturating_duration_since(now).saturating_sub(INTERVAL * BURST);
        if wait > limit {
            return None;
        }
        self.full_at = Some(full_at);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_free_and_then_each_connection_waits_longer() {
        let (mut rate, begin) = (Rate::default(), Instant::now());
        let limit = INTERVAL * 3;
        for _ in 0..BURST {
            assert_eq!(rate.reserve(begin, limit), Some(Duration::ZERO));
        }
        let waits: Vec<_> = (0..5).map(|_| rate.reserve(begin, limit)).collect();
        assert_eq!(waits, [Some(INTERVAL), Some(INTERVAL * 2), Some(INTERVAL * 3), None, None]);
        // The refused connections have taken no token.
        let later = begin + INTERVAL * 4;
        assert_eq!(rate.reserve(later, limit), Some(Duration::ZERO));
        assert_eq!(rate.reserve(later, limit), Some(INTERVAL));
        // An idle pod saves no more than one burst.
        let much_later = begin + INTERVAL * BURST * 10;
        let free = (0..2 * BURST).filter(|_| rate.reserve(much_later, limit) == Some(Duration::ZERO)).count();
        assert_eq!(free, BURST as usize);
    }
}
