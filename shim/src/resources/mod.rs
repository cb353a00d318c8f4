//! How large a pod is: the size of its VM at boot and while containers come and go, and its limits on the host.

pub mod boot_size;
pub mod cgroup;
pub mod cgroup_v1_metrics;
pub mod growth;
pub mod hugepages;
pub mod limits;
pub mod reclaim;
pub mod resize;

pub use boot_size::{BootSize, BootSizeError, boot_size};
