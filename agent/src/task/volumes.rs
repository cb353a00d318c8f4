//! What a container has of the shared file system: mounts that the kernel makes by itself at the first look (FUSE
//! submounts, fs/fuse/dir.c, `fuse_dentry_automount`).
//!
//! The first look is taken in the agent's mount namespace. One taken in a container's would make a file system of that
//! container's own, and a fifo, a socket or a lock of one container would be none in the other. Somebody has to unmount
//! them then, or the host's mounts would be in use as long as the guest lives.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use husk_proto::volume;
use libcontainer::oci_spec::runtime::Spec;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// The shared paths of a specification: its mounts' sources and its root file system.
pub fn of(spec: &Spec) -> Vec<PathBuf> {
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    let root = spec.root().iter().map(|root| root.path());
    sources.chain(root).filter_map(|path| volume::shared_of(path)).collect()
}

/// Takes the first look at each; blocks. What cannot be opened is found out by whoever mounts it.
pub fn visit(paths: &[PathBuf]) {
    for path in paths {
        let _ = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NONBLOCK).open(path);
    }
}

/// Unmounts them; blocks.
pub fn leave(paths: &[PathBuf]) {
    for path in paths {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // A file, which has no mount of its own, or one that the host has taken away.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => tracing::warn!("{}: {error}", Path::display(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_proto::GUEST_SHARE;

    #[test]
    fn what_is_shared() {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "root": { "path": format!("{GUEST_SHARE}/c/rootfs") },
            "mounts": [
                { "destination": "/a", "type": "bind", "source": format!("{GUEST_SHARE}/.volumes/1") },
                { "destination": "/b", "type": "bind", "source": "/run/husk/shm" },
                { "destination": "/d", "type": "bind", "source": "/run/husk/subpaths/c/3@2" },
                { "destination": "/c", "type": "tmpfs" },
            ],
        });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(of(&spec), [".volumes/1", ".volumes/2", "c/rootfs"].map(|path| Path::new(GUEST_SHARE).join(path)));
        visit(&of(&spec));
        leave(&of(&spec));
    }
}
