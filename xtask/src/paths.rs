//! Where things are: the repository, what is built from it, and the tree that is installed.

use std::path::{Path, PathBuf};

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// What xtask builds and remembers.
pub fn state() -> PathBuf {
    target().join("husk")
}

/// The tree that is copied over `/` of a node.
pub fn dist() -> PathBuf {
    root().join("dist/root")
}

/// The guest kernel, stripped.
pub fn vmlinux() -> PathBuf {
    state().join("kernel/vmlinux")
}

/// The guest's initramfs.
pub fn initrd() -> PathBuf {
    state().join("image/initrd.cpio")
}

/// What belongs to the test node.
pub fn node() -> PathBuf {
    state().join("node")
}

/// The results of the last end-to-end run: JSON, JUnit and logs.
pub fn results() -> PathBuf {
    state().join("results")
}
