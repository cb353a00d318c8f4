//! Makes the sandbox's specification and the pod's files for `sandboxer = "shim"`.
//!
//! With this setting, containerd passes only the pod's configuration to the shim. With `sandboxer = "podsandbox"`,
//! containerd makes the specification and the files, and the pod has a sandbox container.

mod files;
mod specification;

pub use files::{FILES, FilesError, add_mounts, write};
pub use specification::{PodError, config, specification};
