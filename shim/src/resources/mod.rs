//! Sizes the pod's VM at boot, and resizes the VM when containers are added, updated or removed. Sets the pod's limits
//! on the host.

pub mod boot_size;
pub mod cgroup;
pub mod cgroup_v1_metrics;
pub mod growth;
pub mod hugepages;
pub mod limits;
pub mod oom_score;
pub mod rate_limits;
pub mod reclaim;
pub mod resize;

pub use boot_size::{BootSize, BootSizeError, boot_size};
pub use rate_limits::rate_limits;
