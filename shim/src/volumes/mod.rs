//! Makes a container's rootfs and volumes available to the guest: in the share, as mirrored volumes, or as memory
//! volumes.
//!
//! All functions outside [`mirror`] block. Call these functions in `blocking::spawn`, or before the async runtime
//! starts.

pub mod bind;
mod covers;
pub mod error;
#[cfg(test)]
pub mod hanging_fs;
pub mod host_only;
pub mod kubelet_paths;
mod loop_device;
mod memory_volume;
pub mod mirror;
pub mod mount_api;
mod mount_tree;
pub mod mountinfo;
mod overlay;
pub mod plan;
pub mod propagate;
mod reuse;
pub mod rootfs;
pub mod share;
pub mod shared_mounts;
pub mod source;
pub mod staging_dir;
mod submounts;
pub mod teardown;
#[cfg(test)]
pub mod test_support;
mod unmount;

pub use rootfs::RootMount;
pub use share::{Share, ShareError};
pub use teardown::teardown;
