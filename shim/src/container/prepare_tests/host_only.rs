//! Tests that no host-only file system gets into the share.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount, umount2},
    sched::{CloneFlags, unshare},
};
use serde_json::json;

use crate::container::prepare::*;
use crate::container::prepare_tests::*;
use crate::volumes::*;

/// Each entry has a host-only file system type, and the directory on which a test mounts a file system of this type.
const HOST_ONLY: [(&str, &str); 6] = [
    ("proc", "proc"),
    ("sysfs", "sys"),
    ("cgroup2", "cgroup"),
    ("devpts", "pts"),
    ("mqueue", "mqueue"),
    ("devtmpfs", "dev"),
];

/// Creates a directory that contains one mount of each host-only type, and a tmpfs with a file.
fn mount_host_only(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    let none = None::<&Path>;
    for (kind, name) in HOST_ONLY {
        fs::create_dir_all(root.join(name)).unwrap();
        let options = (kind == "devpts").then_some("newinstance");
        mount(Some(kind), &root.join(name), Some(kind), MsFlags::empty(), options).unwrap();
    }
    // Mount a tmpfs on `dev/shm`, which is inside the devtmpfs. The guest must not see this tmpfs.
    mount(Some("t"), &root.join("dev/shm"), Some("tmpfs"), MsFlags::empty(), none)
        .or_else(|_| {
            fs::create_dir(root.join("dev/shm"))?;
            mount(Some("t"), &root.join("dev/shm"), Some("tmpfs"), MsFlags::empty(), none).map_err(std::io::Error::from)
        })
        .unwrap();
    // Cover the sysfs with an empty tmpfs. The guest may see this tmpfs, but must not see the sysfs.
    tmpfs(&root.join("sys"));
    fs::create_dir(root.join("data")).unwrap();
    tmpfs(&root.join("data"));
    fs::write(root.join("data/file"), "data").unwrap();
    root
}

fn assert_no_host_only(volume: &Path, share: &Share) {
    for (_, name) in HOST_ONLY {
        let found: Vec<_> = fs::read_dir(volume.join(name)).unwrap().collect();
        assert!(found.is_empty(), "{name}: {found:?}");
    }
    for root in [&share.host, &share.guest] {
        let entries = mountinfo::read().unwrap();
        let below = entries.iter().filter(|entry| entry.point.starts_with(root));
        let kinds: Vec<_> = below.map(|entry| entry.kind.clone()).collect();
        assert!(!kinds.iter().any(|kind| HOST_ONLY.iter().any(|(host_only, _)| host_only == kind)), "{kinds:?}");
    }
}

#[test]
fn volumes_exclude_host_only_file_systems() {
    for options in [&["rbind", "ro"][..], &["rbind", "rw"], &["rbind", "rro"], &["rbind", "rslave", "rw"]] {
        isolated(move |dir| {
            let share = share(dir);
            let root = mount_host_only(dir);
            let seen = prepare_volume(dir, &share, &root, options);
            assert_no_host_only(&seen, &share);
            assert_eq!(fs::read_to_string(seen.join("data/file")).unwrap(), "data");
            // The host's mounts are unchanged.
            assert!(root.join("proc/self").exists() && root.join("dev/null").exists());
            teardown(&share.host, "c1").unwrap();
            assert_eq!(entries_in_share(&share), 0);
            assert_eq!(staged_trees(&share), 0);
        });
    }
}

/// Runs `test` in a mount namespace that, like the VMM's, has no mounts below `dir` except those of the share's
/// directory `guest`. In the namespace of the host, the kernel would refuse to remove a mount point in any case.
fn in_namespace_of_vmm(dir: &Path, share: &Share, test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let vmm = scope.spawn(|| {
            let none = None::<&Path>;
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
            let entries = mountinfo::read().unwrap();
            let of_host = |point: &&PathBuf| point.starts_with(dir) && !point.starts_with(&share.guest);
            for point in entries.iter().rev().map(|entry| &entry.point).filter(of_host) {
                // The unmount of another mount may have included this mount.
                let _ = umount2(point, MntFlags::MNT_DETACH);
            }
            test();
        });
        vmm.join().unwrap();
    });
}

/// Checks that the guest can neither remove nor replace `place`, nor create anything in it.
fn assert_covered(place: &Path) {
    let error = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    let (busy, other) = (Some(libc::EBUSY), place.with_file_name("other"));
    let is_dir = fs::metadata(place).unwrap().is_dir();
    let (removed, made) = if is_dir {
        (fs::remove_dir(place), fs::create_dir(&other))
    } else {
        (fs::remove_file(place), fs::write(&other, ""))
    };
    made.unwrap();
    assert_eq!(error(removed), busy, "{place:?}");
    assert_eq!(error(fs::rename(place, place.with_file_name("new"))), busy, "{place:?}");
    assert_eq!(error(fs::rename(&other, place)), busy, "{place:?}");
    let written = if is_dir { fs::write(place.join("new"), "") } else { fs::write(place, "new") };
    assert_eq!(error(written), Some(libc::EROFS), "{place:?}");
    if is_dir { fs::remove_dir(&other).unwrap() } else { fs::remove_file(&other).unwrap() }
}

fn is_mounted(point: &Path) -> bool {
    mountinfo::read().unwrap().iter().any(|entry| entry.point == point)
}

#[test]
fn guest_cannot_detach_host_only_mounts_of_the_host() {
    for options in [&["rbind", "rw"][..], &["rbind", "rslave", "rw"]] {
        isolated(move |dir| {
            let share = share(dir);
            let root = mount_host_only(dir);
            // The mount point of this mount is a file.
            fs::write(root.join("netns"), "").unwrap();
            mount(Some("/proc/self/ns/net"), &root.join("netns"), None::<&Path>, MsFlags::MS_BIND, None::<&Path>)
                .unwrap();
            let seen = prepare_volume(dir, &share, &root, options);
            let places = || HOST_ONLY.map(|(_, name)| name).into_iter().chain(["netns"]);
            // The update changes nothing, because the host has made no mounts since.
            for update in [false, true] {
                if update {
                    sync_mounts(&share.host).unwrap();
                }
                in_namespace_of_vmm(dir, &share, || {
                    // The sysfs is hidden by a tmpfs, which is copied. Therefore, this place has no cover.
                    places().filter(|name| *name != "sys").for_each(|name| assert_covered(&seen.join(name)));
                    assert_eq!(fs::remove_dir(seen.join("sys")).unwrap_err().raw_os_error(), Some(libc::EBUSY));
                });
                for name in places() {
                    assert!(is_mounted(&root.join(name)), "the guest has detached {name}");
                }
            }
            teardown(&share.host, "c1").unwrap();
            assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
        });
    }
}

#[test]
fn guest_cannot_detach_later_host_only_mounts_of_the_host() {
    isolated(|dir| {
        let (share, root) = (share(dir), shared_mount(dir));
        fs::create_dir(root.join("proc")).unwrap();
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
        sync_mounts(&share.host).unwrap();
        in_namespace_of_vmm(dir, &share, || assert_covered(&seen.join("proc")));
        assert!(is_mounted(&root.join("proc")));
        // The cover is removed together with the host's mount.
        umount(&root.join("proc")).unwrap();
        sync_mounts(&share.host).unwrap();
        fs::remove_dir(seen.join("proc")).unwrap();
        assert!(!root.join("proc").exists());
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn prepare_rejects_a_volume_whose_host_only_mounts_cannot_be_covered() {
    isolated(|dir| {
        let share = share(dir);
        let root = mount_host_only(dir);
        fs::remove_dir(staging_dir::StagingDir::for_share(&share.host).dir().join("covers/directory")).unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/host", "type": "bind", "source": root, "options": ["rbind"]}));
        });
        let request = Request {
            id: "c1",
            share: &share.host,
            rootfs: &[overlay(dir, 1)],
            host: &HostView::own(),
            host_sockets: &[],
            pids: &HashMap::new(),
        };
        let error = crate::chain(&prepare(&bundle, &request).unwrap_err());
        assert!(error.contains("failed to cover /"), "{error}");
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn prepare_rejects_a_host_only_rootfs_or_layer() {
    isolated(|dir| {
        let share = share(dir);
        let rejected = |rootfs: RootMount| {
            let error = crate::chain(&prepare_from(&bundle(dir, |_| {}), "c1", &share.host, &[rootfs]).unwrap_err());
            assert!(error.contains("host-only file system"), "{error}");
        };
        for kind in ["proc", "sysfs", "devtmpfs", "cgroup2"] {
            rejected(RootMount { kind: kind.into(), source: kind.into(), ..RootMount::default() });
        }
        let layer = dir.join("layer");
        fs::create_dir(&layer).unwrap();
        for lower in ["/sys", "/dev"] {
            let options = vec![format!("lowerdir={lower}:{}", layer.display())];
            rejected(RootMount { kind: "overlay".into(), source: "overlay".into(), options, ..RootMount::default() });
        }
        assert_eq!(entries_in_share(&share), 0);
    });
}

#[test]
fn volumes_exclude_the_share_of_the_sandbox() {
    isolated(|dir| {
        let share = share(dir);
        let seen = prepare_volume(dir, &share, &dir.join("sandbox"), &["rbind", "ro"]);
        for name in ["share", "guest", "stage"] {
            assert_eq!(fs::read_dir(seen.join(name)).unwrap().count(), 0, "{name}");
        }
        // The receiving tree of this volume does not contain the share. Nevertheless, an update keeps the covers.
        let received = prepare_volume_for("c2", dir, &share, &dir.join("sandbox"), &["rbind", "rslave", "rw"]);
        sync_mounts(&share.host).unwrap();
        in_namespace_of_vmm(dir, &share, || {
            for name in ["share", "guest", "stage"] {
                assert_covered(&received.join(name));
            }
        });
        teardown(&share.host, "c2").unwrap();
        teardown(&share.host, "c1").unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/x", "type": "bind", "source": share.host, "options": ["rbind"]}));
        });
        let request = Request {
            id: "c1",
            share: &share.host,
            rootfs: &[overlay(dir, 1)],
            host: &HostView::own(),
            host_sockets: &[],
            pids: &HashMap::new(),
        };
        let error = crate::chain(&prepare(&bundle, &request).unwrap_err());
        assert!(error.contains("the sandbox's share"), "{error}");
        assert_eq!(entries_in_share(&share), 0);
    });
}

#[test]
fn rootfs_excludes_host_only_file_systems() {
    isolated(|dir| {
        let share = share(dir);
        let root = mount_host_only(dir);
        let bundle = bundle(dir, |spec| spec["root"]["path"] = json!(root));
        let prepared = prepare_from(&bundle, "c1", &share.host, &[]).unwrap();
        let seen = share.guest.join("c1/host-rootfs");
        assert_no_host_only(&seen, &share);
        assert_eq!(fs::read_to_string(seen.join("data/file")).unwrap(), "data");
        assert!(prepared.notes.iter().any(|note| note.contains("/proc (proc)")), "{:?}", prepared.notes);
        teardown(&share.host, "c1").unwrap();
        let host_only = RootMount {
            kind: "bind".into(),
            source: root.join("proc").to_string_lossy().into(),
            ..RootMount::default()
        };
        let error = crate::chain(&prepare_from(&bundle, "c2", &share.host, &[host_only]).unwrap_err());
        assert!(error.contains("host-only file system (proc)"), "{error}");
        assert_eq!(entries_in_share(&share), 0);
    });
}
