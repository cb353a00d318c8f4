//! Tests [`prepare`] in a mount namespace that contains few mounts of the host, as in the shim's daemon.

use std::{collections::HashMap, fs, path::Path};

use nix::mount::{MsFlags, mount, umount};
use serde_json::json;

use crate::container::prepare::*;
use crate::container::prepare_tests::*;
use crate::volumes::test_support::Daemon;
use crate::volumes::*;

/// Starts a daemon with a share in `dir/state`. The daemon's namespace contains no other mount below `dir`.
fn daemon(dir: &Path) -> (Daemon, Share) {
    fs::create_dir(dir.join("state")).unwrap();
    let daemon = Daemon::start(&dir.join("state"));
    let state = dir.join("state");
    let share = daemon.run(move |_| share(&state));
    (daemon, share)
}

/// Prepares container `c1` in the daemon's namespace. Returns the path of its volume below `share.guest`.
fn prepare_in(
    daemon: &Daemon,
    share: &Share,
    (dir, source): (&Path, &Path),
    rootfs: RootMount,
    options: &[&str],
) -> PathBuf {
    prepare_in_for("c1", daemon, share, (dir, source), rootfs, options)
}

fn prepare_in_for(
    id: &'static str,
    daemon: &Daemon,
    share: &Share,
    (dir, source): (&Path, &Path),
    rootfs: RootMount,
    options: &[&str],
) -> PathBuf {
    let bundle = bundle(dir, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/v", "type": "bind", "source": source, "options": options}));
    });
    let share = share.clone();
    daemon.run(move |host| {
        let pids = HashMap::new();
        let request = Request { id, share: &share.host, rootfs: &[rootfs], host, host_sockets: &[], pids: &pids };
        guest_source(&share, &prepare(&bundle, &request).unwrap(), 2)
    })
}

fn read(daemon: &Daemon, path: PathBuf) -> Option<String> {
    daemon.run(move |_| fs::read_to_string(path).ok())
}

#[test]
fn volumes_and_layers_can_be_mounts_that_the_host_makes_later() {
    isolated(|dir| {
        let root = shared_mount(dir);
        let (daemon, share) = daemon(dir);
        for name in ["volume", "layers", "image"] {
            tmpfs(&root.join(name));
            fs::write(root.join(name).join("file"), name).unwrap();
        }
        // As with snapshotters that use FUSE, a layer is a mount of its own.
        let RootMount { mut options, .. } = overlay(&root.join("layers"), 1);
        options[2] = format!("{}:{}", options[2], root.join("image").display());
        let rootfs = RootMount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options };
        let seen = prepare_in(&daemon, &share, (dir, &root.join("volume")), rootfs, &["rbind", "rw"]);
        assert_eq!(read(&daemon, seen.join("file")).as_deref(), Some("volume"));
        assert_eq!(read(&daemon, share.guest.join("c1/rootfs/file")).as_deref(), Some("image"));
        let new = share.guest.join("c1/rootfs/new");
        daemon.run(move |_| fs::write(new, "new").unwrap());
        let upper = root.join("layers/snapshots-with-a-name-as-long-as-that-of-containerds-own-snapshotter/upper");
        assert_eq!(fs::read_to_string(upper.join("new")).unwrap(), "new");
        // The shim does not keep the host's mounts busy.
        for name in ["volume", "layers", "image"] {
            umount(&root.join(name)).unwrap();
        }
        let host = share.host.clone();
        daemon.run(move |_| teardown(&host, "c1").unwrap());
    });
}

#[test]
fn containers_use_the_mount_that_contains_their_source_on_the_host() {
    isolated(|dir| {
        let root = shared_mount(dir);
        let (daemon, share) = daemon(dir);
        tmpfs(&root.join("volume"));
        for name in ["volume/sub/deep", "sub-path"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let (none, deep) = (None::<&Path>, root.join("volume/sub/deep"));
        mount(Some(&root.join("volume/sub")), &root.join("sub-path"), none, MsFlags::MS_BIND, none).unwrap();
        let prepare = |id, source: &str, options: &[&str]| {
            prepare_in_for(id, &daemon, &share, (dir, &root.join(source)), overlay(dir, 1), options)
        };
        let whole = prepare("c1", "volume", &["rbind", "rw"]);
        assert_eq!(prepare("c2", "volume/sub", &["rbind", "ro"]), whole.join("sub"));
        assert_eq!(prepare("c3", "sub-path", &["rbind", "rw"]), whole.join("sub"));
        // A later mount of the host is not in the mount of the whole volume.
        tmpfs(&deep);
        assert!(!prepare("c4", "volume/sub/deep", &["rbind"]).starts_with(&whole));
        assert!(!prepare("c5", "volume/sub", &["rbind"]).starts_with(&whole));
        let host = share.host.clone();
        daemon.run(move |_| {
            for id in ["c1", "c2", "c3", "c4", "c5"] {
                teardown(&host, id).unwrap();
            }
            assert_eq!(entries_in_share(&share), 0);
        });
    });
}

#[test]
fn mounts_of_the_host_reach_only_volumes_that_receive_them() {
    isolated(|dir| {
        let root = shared_mount(dir);
        for name in ["volume", "volume/later", "other"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        tmpfs(&root.join("volume/early"));
        let (daemon, share) = daemon(dir);
        let seen = prepare_in(&daemon, &share, (dir, &root.join("volume")), overlay(dir, 1), &["rbind", "rslave"]);
        let count = || daemon.run(|_| mountinfo::read().unwrap().len());
        let before = count();
        tmpfs(&root.join("other"));
        assert_eq!(count(), before, "a mount that no volume contains was copied");
        tmpfs(&root.join("volume/later"));
        fs::write(root.join("volume/later/file"), "later").unwrap();
        let sync = || {
            let host = share.host.clone();
            daemon.run(move |_| sync_mounts(&host).unwrap());
        };
        sync();
        assert_eq!(read(&daemon, seen.join("later/file")).as_deref(), Some("later"));
        // The host can unmount everything at once, although a guest has a file open.
        let (opened, at) = (seen.join("later/file"), seen.join("later/file"));
        let held = daemon.run(move |_| fs::File::open(opened).unwrap());
        for name in ["volume/later", "volume/early", "other"] {
            umount(&root.join(name)).unwrap();
        }
        sync();
        assert_eq!(read(&daemon, at), None);
        drop(held);
        let host = share.host.clone();
        daemon.run(move |_| teardown(&host, "c1").unwrap());
    });
}

#[test]
fn guest_cannot_remove_the_mount_points_of_the_sandbox() {
    for options in [&["rbind", "rw"][..], &["rbind", "rslave", "rw"]] {
        isolated(move |dir| {
            let (daemon, share) = daemon(dir);
            let seen = prepare_in(&daemon, &share, (dir, dir), overlay(dir, 1), options);
            let sync = share.host.clone();
            let points = daemon.run(move |_| {
                sync_mounts(&sync).unwrap();
                mounts_below(&seen.join("state"))
            });
            let mut names: Vec<_> = points.iter().map(|point| point.rsplit('/').next().unwrap()).collect();
            names.sort_unstable();
            assert_eq!(names, ["guest", "share", "stage"], "{points:?}");
            let host = share.host.clone();
            daemon.run(move |_| teardown(&host, "c1").unwrap());
        });
    }
}
