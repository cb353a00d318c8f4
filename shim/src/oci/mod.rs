//! Parses and checks a container's OCI specification, and translates the specification for the guest.
//!
//! Many functions in these modules block on file system calls. Call these functions only in `blocking::spawn`, or
//! before the async runtime starts.

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
