//! For tests with real mounts: a thread with a mount namespace of its own. They need root, as `cargo xtask test` does.

use std::path::{Path, PathBuf};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Runs `test` in a thread with a new mount namespace and a new directory, like those of the shim's daemon.
pub fn isolated(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("mounts need root");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
    });
    thread.join().unwrap();
}

/// Mounts a tmpfs at `point`, which is created if it does not exist.
pub fn tmpfs(point: &Path) {
    std::fs::create_dir_all(point).unwrap();
    mount(Some("t"), point, Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
}

/// Mounts a tmpfs with shared propagation, which mounts on a host usually have. Returns its mount point.
pub fn shared_mount(dir: &Path) -> PathBuf {
    let (root, none) = (dir.join("shared"), None::<&Path>);
    tmpfs(&root);
    mount(none, &root, none, MsFlags::MS_SHARED, none).unwrap();
    root
}
