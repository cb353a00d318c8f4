//! The volumes of a container that are in the share. The guest kernel automounts each of them at the first access (FUSE
//! submounts, fs/fuse/dir.c, `fuse_dentry_automount`).
//!
//! The agent accesses the volumes first, in its own mount namespace. An automount in a container's mount namespace
//! would be a separate file system. In this case, containers could not share fifos, sockets or locks. The agent
//! also has to unmount the volumes. Otherwise the host's mounts would stay in use until the VM ends.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use husk_proto::volume;
use libcontainer::oci_spec::runtime::Spec;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Returns the shared volumes of a specification, which are sources of its mounts or contain its rootfs.
pub fn of_spec(spec: &Spec) -> Vec<PathBuf> {
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    let root = spec.root().iter().map(|root| root.path());
    sources.chain(root).filter_map(|path| volume::shared_volume_of(path)).collect()
}

/// Triggers the automount of each path. Blocks the calling thread. Ignores errors, because libcontainer reports an
/// error when it mounts the path.
pub fn trigger_automounts(paths: &[PathBuf]) {
    for path in paths {
        let _ = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NONBLOCK).open(path);
    }
}

/// Unmounts the automounts at `paths`. Blocks the calling thread. Best effort.
pub fn unmount(paths: &[PathBuf]) {
    for path in paths {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // The path is a file, which is not automounted, or the host has removed the volume.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => tracing::warn!("failed to unmount {}: {error}", Path::display(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::GUEST_SHARE;

    use super::*;

    #[test]
    fn of_spec_returns_paths_in_the_share() {
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
        assert_eq!(
            of_spec(&spec),
            [".volumes/1", ".volumes/2", "c/rootfs"].map(|path| Path::new(GUEST_SHARE).join(path))
        );
        trigger_automounts(&of_spec(&spec));
        unmount(&of_spec(&spec));
    }
}
