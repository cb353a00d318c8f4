//! A container's bundle: reading it, refusing what a virtual machine cannot give, and making it ready for the guest.
//!
//! Everything here blocks (file system and mount calls): call it from `spawn_blocking`, or before the runtime is up.
//!
//! ```text
//! let bundle = Bundle::read(dir)?;                  // config.json
//! bundle.check()?;                                  // host namespaces are rejected
//! let sizing = sizing(&bundle.spec, &config)?;      // once per sandbox
//! let share = Share::mount(sandbox_dir)?;           // once per sandbox; the VMM gets share.guest
//! let rootfs: Vec<RootMount> = request.rootfs.iter().map(RootMount::from).collect();
//! let prepared = prepare(&bundle, &Request { id, share: &share.host, rootfs: &rootfs })?;
//! …
//! teardown(&share.host, id)?;                       // any number of times
//! share.unmount();
//! ```

pub mod annotations;
mod binds;
pub mod cpuset;
mod devices;
mod disks;
pub mod growth;
mod hooks;
mod host_only;
pub mod json;
mod kubelet;
mod load;
mod loopdev;
mod mountinfo;
mod own;
mod prepare;
mod rootfs;
mod share;
mod sizing;
mod spec;
mod stage;
mod syscall;
mod teardown;
#[cfg(test)]
mod tests;
mod translate;
mod tree;
mod unmount;
mod update;
mod users;
mod volume_error;
mod volumes;

pub use binds::sync as sync_mounts;
pub use disks::{Disk, Numbers, number_anew};
pub use json::TranslateError;
pub use load::{Bundle, BundleError};
pub use prepare::{PrepareError, Prepared, Request, prepare};
pub use rootfs::{RootMount, RootfsError};
pub use share::{Share, ShareError};
pub use sizing::{Sizing, SizingError, sizing};
pub use spec::{Hook, Mount, Network, Resources, Spec};
pub use stage::SyncError;
pub use teardown::{TeardownError, teardown};
pub use translate::exec_process;
pub use update::resources_update;
pub use users::{IdMapping, Users};
pub use volume_error::VolumeError;
