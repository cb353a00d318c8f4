//! Limits the rate of log lines by their source, because a guest can cause lines: its VMM and its agent report what it
//! does. A guest must not fill the node's journal or hide other pods' lines in it.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Number of lines that a source may log at once.
const BURST: u32 = 300;
/// Time after which a source may log one line more.
const INTERVAL: Duration = Duration::from_millis(200);

/// What to do with a line.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Log it. This many lines of the same source were left out before it.
    Log(u64),
    /// Log in its place that lines of this source are left out from now on.
    First,
    /// Leave it out.
    Drop,
}

/// A token bucket for each source. There are as many sources as there are places in the program that log.
pub struct Limiter<S>(HashMap<S, Bucket>);

struct Bucket {
    tokens: u32,
    /// When the last token was added.
    filled: Instant,
    dropped: u64,
}

impl<S> Default for Limiter<S> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<S: Hash + Eq> Limiter<S> {
    /// Decides about a line that `source` logs at time `now`.
    pub fn decide(&mut self, source: S, now: Instant) -> Decision {
        let bucket = self.0.entry(source).or_insert(Bucket { tokens: BURST, filled: now, dropped: 0 });
        let new = now.saturating_duration_since(bucket.filled).as_nanos() / INTERVAL.as_nanos();
        match u32::try_from(new).ok().filter(|new| *new < BURST - bucket.tokens) {
            Some(new) => {
                bucket.tokens += new;
                bucket.filled += INTERVAL * new;
            }
            None => {
                bucket.tokens = BURST;
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

    #[test]
    fn burst_is_logged_and_a_flood_is_counted() {
        let mut limiter = Limiter::default();
        let begin = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limiter.decide("vmm", begin), Decision::Log(0));
        }
        assert_eq!(limiter.decide("vmm", begin), Decision::First);
        for _ in 1..1000 {
            assert_eq!(limiter.decide("vmm", begin), Decision::Drop);
        }
        // Another source has a bucket of its own.
        assert_eq!(limiter.decide("agent", begin), Decision::Log(0));
        assert_eq!(limiter.decide("vmm", begin + INTERVAL), Decision::Log(1000));
        assert_eq!(limiter.decide("vmm", begin + INTERVAL), Decision::First);
    }

    #[test]
    fn steady_lines_at_the_rate_are_never_left_out() {
        let mut limiter = Limiter::default();
        let begin = Instant::now();
        for number in 0..5 * BURST {
            assert_eq!(limiter.decide("vmm", begin + INTERVAL * number), Decision::Log(0));
        }
    }

    #[test]
    fn bucket_is_full_again_after_silence() {
        let mut limiter = Limiter::default();
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
