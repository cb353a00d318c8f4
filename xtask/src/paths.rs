//! The paths of the repository, of the build outputs and of `dist/root`.

use std::path::{Path, PathBuf};

/// Returns the root directory of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Returns cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Returns the directory for everything that xtask builds, except `dist/root`.
pub fn state() -> PathBuf {
    target().join("husk")
}

/// Returns the path of `dist/root`, the directory whose content an installation copies to `/` of a node.
pub fn dist() -> PathBuf {
    root().join("dist/root")
}

/// Returns the path of the stripped guest kernel.
pub fn vmlinux() -> PathBuf {
    state().join("kernel/vmlinux")
}

/// Returns the path of the guest's initramfs.
pub fn initrd() -> PathBuf {
    state().join("image/initrd.cpio")
}

/// Returns the directory of the test node's files.
pub fn node() -> PathBuf {
    state().join("node")
}

/// Returns the directory with the results of the last runs: JSON, JUnit and logs.
pub fn results() -> PathBuf {
    state().join("results")
}
