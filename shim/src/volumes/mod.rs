//! Root file systems and volumes. They are mounted in the sandbox's share on the host, or mirrored to the guest, or
//! created in the guest.
//!
//! All functions except those of [`mirror`] block on file system and mount calls. Call them in `spawn_blocking`, or
//! before the async runtime is started.

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
pub mod stage;
pub mod teardown;
mod unmount;

pub use bind::sync as sync_mounts;
pub use error::VolumeError;
pub use rootfs::{RootMount, RootfsError};
pub use share::{Share, ShareError};
pub use stage::SyncError;
pub use teardown::{TeardownError, teardown};
