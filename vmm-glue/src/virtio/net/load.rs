//! Decides, from the number of frames within a second, when vhost-net should move the frames.

use std::time::{Duration, Instant};

/// Number of frames within a [`WINDOW`] that counts as high load. A pod that only answers probes and occasional
/// requests stays far below this number. Therefore, such a pod never pays the cost of vhost-net. For each queue pair,
/// vhost-net needs 200 KiB of host memory and a thread. The end of the VMM is delayed, because vhost-net waits for an
/// RCU grace period. A file transfer, or a busy server, soon exceeds this number of frames.
const HIGH_LOAD_FRAMES: u32 = 128;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts frames.
#[derive(Debug, Default)]
pub struct Load {
    since: Option<Instant>,
    frames: u32,
}

impl Load {
    /// Adds `frames` that were moved until `now`.
    pub fn add(&mut self, frames: u32, now: Instant) {
        if self.is_high() {
            return;
        }
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.frames) = (Some(now), 0);
        }
        self.frames = self.frames.saturating_add(frames);
    }

    /// Returns whether the load was high in any window so far.
    pub fn is_high(&self) -> bool {
        self.frames >= HIGH_LOAD_FRAMES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_high_after_many_frames_within_a_second() {
        let (start, mut load) = (Instant::now(), Load::default());
        for second in 0..100 {
            load.add(HIGH_LOAD_FRAMES - 1, start + WINDOW * second);
            assert!(!load.is_high(), "the load must not be high with few frames each second");
        }
        load.add(1, start + WINDOW * 99 + WINDOW / 2);
        assert!(load.is_high());
        load.add(1, start + WINDOW * 200);
        assert!(load.is_high(), "the load must stay high after it was high once");
    }
}
