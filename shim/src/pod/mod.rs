//! A pod whose sandbox the shim is itself, without a sandbox container that containerd prepares: what containerd's own
//! controller makes of the pod's configuration is made here, a specification of the sandbox and the pod's files.

mod files;
mod specification;

pub use files::{FILES, FilesError, add_mounts, write};
pub use specification::{PodError, config, specification};
