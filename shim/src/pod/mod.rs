//! Pods with `sandboxer = "shim"`, for which containerd does not prepare a sandbox container.
//!
//! This module makes the sandbox's specification and the pod's files from the pod's configuration. For a pod with a
//! sandbox container, containerd's podsandbox controller makes them.

mod files;
mod specification;

pub use files::{FILES, FilesError, add_mounts, write};
pub use specification::{PodError, config, specification};
