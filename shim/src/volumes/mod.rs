//! Root file systems and volumes: mounted in the sandbox's share on the host, and mirrored or created in the guest.
//!
//! Everything here blocks on file system and mount calls, except [`mirror`]: call it from `spawn_blocking`, or before
//! the runtime is up.

pub mod bind;
pub mod error;
pub mod host_only;
mod kubelet_paths;
mod loop_device;
mod memory_volume;
pub mod mirror;
mod mount_api;
mod mount_tree;
pub mod mountinfo;
pub mod plan;
pub mod rootfs;
pub mod share;
pub mod staging_dir;
pub mod teardown;
#[cfg(test)]
pub mod test_support;
mod unmount;

pub use bind::sync as sync_mounts;
pub use error::VolumeError;
pub use rootfs::{RootMount, RootfsError};
pub use share::{Share, ShareError};
pub use staging_dir::SyncError;
pub use teardown::{TeardownError, teardown};
