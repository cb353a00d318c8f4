//! Measures the duration of each step of [`crate::boot::build`], and logs the duration at debug level.

use std::time::Instant;

/// The time at which the last step ended.
pub struct BootTiming(Instant);

impl BootTiming {
    /// Starts the measurement.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Logs the duration of the step `name`, which began at the end of the last step.
    pub fn step(&mut self, name: &str) {
        let now = Instant::now();
        log::debug!("step \"{name}\" of building the VM took {} µs", now.duration_since(self.0).as_micros());
        self.0 = now;
    }
}
