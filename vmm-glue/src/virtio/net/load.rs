//! Whether there is so much to carry that the host's kernel should do it.

use std::time::{Duration, Instant};

/// Frames within a [`WINDOW`] that are many. A pod that waits, is probed and now and then answers stays far below, and
/// never has what vhost-net costs: 200 KiB of the host's memory and a thread for each pair of queues, and at the end of
/// the VMM a grace period of the kernel's for each. A transfer, or a server that is used, is above within moments.
const MANY: u32 = 128;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts frames.
#[derive(Debug, Default)]
pub struct Load {
    since: Option<Instant>,
    frames: u32,
}

impl Load {
    /// So many frames were carried by now.
    pub fn add(&mut self, frames: u32, now: Instant) {
        if self.is_high() {
            return;
        }
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.frames) = (Some(now), 0);
        }
        self.frames = self.frames.saturating_add(frames);
    }

    /// Whether there were many at some time.
    pub fn is_high(&self) -> bool {
        self.frames >= MANY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_within_a_second_are_many() {
        let (start, mut load) = (Instant::now(), Load::default());
        for second in 0..100 {
            load.add(MANY - 1, start + WINDOW * second);
            assert!(!load.is_high(), "a few each second");
        }
        load.add(1, start + WINDOW * 99 + WINDOW / 2);
        assert!(load.is_high());
        load.add(1, start + WINDOW * 200);
        assert!(load.is_high(), "once is enough");
    }
}
