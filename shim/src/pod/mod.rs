//! Pods under `sandboxer = "shim"`, which have no sandbox container prepared by containerd.
//!
//! From the pod's configuration this module makes the sandbox's specification and the pod's files. containerd's own
//! podsandbox controller does the same for a sandbox container.

mod files;
mod specification;

pub use files::{FILES, FilesError, add_mounts, write};
pub use specification::{PodError, config, specification};
