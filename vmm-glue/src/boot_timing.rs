//! Measures the duration of each step of [`crate::boot::build`], and logs the duration at debug level.

use std::time::Instant;

/// Time of the last step.
pub struct BootTiming(Instant);

impl BootTiming {
    /// Starts the measurement.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Logs the time since the last step.
    pub fn step(&mut self, name: &str) {
        let now = Instant::now();
        log::debug!("boot step \"{name}\" took {} µs", now.duration_since(self.0).as_micros());
        self.0 = now;
    }
}
