//! A container's OCI bundle: its specification is parsed once, checked, and translated for the guest.
//!
//! The functions of these modules block on file system calls. Call them in `spawn_blocking`, or before the async
//! runtime is started.

pub mod annotations;
pub mod bundle;
pub mod cpuset;
pub mod devices;
pub mod disks;
mod hooks;
mod host_devices;
pub mod id_mappings;
pub mod json;
pub mod spec;
pub mod translate;
pub mod update;

pub use bundle::{Bundle, BundleError};
pub use disks::{DeviceNumbers, Disk, replace_disk_numbers};
pub use id_mappings::{IdMapping, IdMappings};
pub use json::TranslateError;
pub use spec::{Hook, Mount, Network, Resources, Spec};
pub use translate::exec_process;
pub use update::resources_update;
