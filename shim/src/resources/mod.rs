//! The size of a pod: its VM's size at boot and while containers are added and removed, and its limits on the host.

pub mod boot_size;
pub mod cgroup;
pub mod cgroup_v1_metrics;
pub mod growth;
pub mod hugepages;
pub mod limits;
pub mod oom_score;
pub mod reclaim;
pub mod resize;

pub use boot_size::{BootSize, BootSizeError, boot_size};
