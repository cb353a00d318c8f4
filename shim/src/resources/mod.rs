//! How large a pod is: the size of its VM at boot and while containers come and go, and its limits on the host.

pub mod cgroup;
pub mod growth;
pub mod hugepages;
pub mod legacy_metrics;
pub mod limits;
pub mod reclaim;
pub mod resize;
pub mod sizing;

pub use sizing::{Sizing, SizingError, sizing};
