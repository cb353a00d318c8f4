//! Limits the rate of log lines per source. A guest can cause log lines, because the VMM and the agent report what the
//! guest does. A guest must not fill the node's journal or hide the lines of other pods.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Time after which a source may log one more line.
const INTERVAL: Duration = Duration::from_millis(200);

/// What to do with a line.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Log the line. The value is the number of lines from the source that were left out before this line.
    Log(u64),
    /// Do not log the line, but log that further lines from the source are left out.
    First,
    /// Do not log the line.
    Drop,
}

/// A token bucket for each source. The number of buckets is bounded, because a source is a call site in the code.
pub struct Limiter<S> {
    buckets: HashMap<S, Bucket>,
    /// Maximum number of lines that a source may log at once.
    burst: u32,
}

struct Bucket {
    tokens: u32,
    /// Time at which the last token was added.
    filled: Instant,
    dropped: u64,
}

impl<S: Hash + Eq> Limiter<S> {
    /// Creates a limiter. A source may log `burst` lines at once, and then five lines per second.
    pub fn new(burst: u32) -> Self {
        Self { buckets: HashMap::new(), burst }
    }

    /// Decides whether to log a line that `source` logs at time `now`.
    pub fn decide(&mut self, source: S, now: Instant) -> Decision {
        let burst = self.burst;
        let bucket = self.buckets.entry(source).or_insert(Bucket { tokens: burst, filled: now, dropped: 0 });
        let new = now.saturating_duration_since(bucket.filled).as_nanos() / INTERVAL.as_nanos();
        match u32::try_from(new).ok().filter(|new| *new < burst - bucket.tokens) {
            Some(new) => {
                bucket.tokens += new;
                bucket.filled += INTERVAL * new;
            }
            None => {
                bucket.tokens = burst;
                bucket.filled = now;
            }
        }
        match bucket.tokens.checked_sub(1) {
            Some(tokens) => {
                bucket.tokens = tokens;
                Decision::Log(std::mem::take(&mut bucket.dropped))
            }
            None => {
                bucket.dropped += 1;
                if bucket.dropped == 1 { Decision::First } else { Decision::Drop }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: u32 = 300;

    #[test]
    fn burst_is_logged_and_further_lines_are_counted() {
        let mut limiter = Limiter::new(BURST);
        let begin = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limiter.decide("vmm", begin), Decision::Log(0));
        }
        assert_eq!(limiter.decide("vmm", begin), Decision::First);
        for _ in 1..1000 {
            assert_eq!(limiter.decide("vmm", begin), Decision::Drop);
        }
        // Each source has its own bucket.
        assert_eq!(limiter.decide("agent", begin), Decision::Log(0));
        assert_eq!(limiter.decide("vmm", begin + INTERVAL), Decision::Log(1000));
        assert_eq!(limiter.decide("vmm", begin + INTERVAL), Decision::First);
    }

    #[test]
    fn lines_within_the_rate_limit_are_never_left_out() {
        let mut limiter = Limiter::new(BURST);
        let begin = Instant::now();
        for number in 0..5 * BURST {
            assert_eq!(limiter.decide("vmm", begin + INTERVAL * number), Decision::Log(0));
        }
    }

    #[test]
    fn bucket_is_full_again_after_silence() {
        let mut limiter = Limiter::new(BURST);
        let begin = Instant::now();
        for _ in 0..2 * BURST {
            limiter.decide("vmm", begin);
        }
        let later = begin + INTERVAL * 10 * BURST;
        assert_eq!(limiter.decide("vmm", later), Decision::Log(u64::from(BURST)));
        for _ in 1..BURST {
            assert_eq!(limiter.decide("vmm", later), Decision::Log(0));
        }
        assert_eq!(limiter.decide("vmm", later), Decision::First);
    }
}
