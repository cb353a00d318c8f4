//! How long each step of a build takes, in the log at debug level.

use std::time::Instant;

/// A running clock.
pub struct Timing(Instant);

impl Timing {
    /// Starts it.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Logs the time since the last step.
    pub fn step(&mut self, name: &str) {
        let now = Instant::now();
        log::debug!("{name}: {} µs", now.duration_since(self.0).as_micros());
        self.0 = now;
    }
}
