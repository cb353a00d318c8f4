//! The factor by which timeouts are multiplied on a slow node.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The factor of a node. It is 1 on hardware, and higher on a node that is emulated or very slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimeoutFactor(pub u32);

impl Default for TimeoutFactor {
    fn default() -> Self {
        Self(1)
    }
}

/// A timeout on a node with the factor 1. Only [`TimeoutFactor::of`] returns the timeout of the node, so that no wait
/// forgets the factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseTimeout(Duration);

impl BaseTimeout {
    /// Returns a timeout of this number of seconds.
    pub const fn from_secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Returns a timeout of this number of milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }
}

impl TimeoutFactor {
    /// Minimum and maximum of the configured factor.
    pub const RANGE: (u32, u32) = (1, 10);

    /// Returns the timeout on this node.
    pub fn of(self, base: BaseTimeout) -> Duration {
        base.0.saturating_mul(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factor_multiplies_every_timeout() {
        assert_eq!(TimeoutFactor::default().of(BaseTimeout::from_secs(2)), Duration::from_secs(2));
        assert_eq!(TimeoutFactor(5).of(BaseTimeout::from_millis(400)), Duration::from_secs(2));
    }
}
