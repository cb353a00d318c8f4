//! Tests that no host-only file system gets into the share.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
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

#[test]
fn prepare_rejects_a_host_only_rootfs_or_layer() {
    isolated(|dir| {
        let share = share(dir);
        let rejected = |rootfs: RootMount| {
            let request = Request { id: "c1", share: &share.host, rootfs: &[rootfs], pids: &HashMap::new() };
            let error = crate::chain(&prepare(&bundle(dir, |_| {}), &request).unwrap_err());
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
        teardown(&share.host, "c1").unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/x", "type": "bind", "source": share.host, "options": ["rbind"]}));
        });
        let request = Request { id: "c1", share: &share.host, rootfs: &[overlay(dir, 1)], pids: &HashMap::new() };
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
        let request = Request { id: "c1", share: &share.host, rootfs: &[], pids: &HashMap::new() };
        let prepared = prepare(&bundle, &request).unwrap();
        let seen = share.guest.join("c1/rootfs");
        assert_no_host_only(&seen, &share);
        assert_eq!(fs::read_to_string(seen.join("data/file")).unwrap(), "data");
        assert!(prepared.notes.iter().any(|note| note.contains("/proc (proc)")), "{:?}", prepared.notes);
        teardown(&share.host, "c1").unwrap();
        let host_only = RootMount {
            kind: "bind".into(),
            source: root.join("proc").to_string_lossy().into(),
            ..RootMount::default()
        };
        let request = Request { id: "c2", rootfs: &[host_only], ..request };
        let error = crate::chain(&prepare(&bundle, &request).unwrap_err());
        assert!(error.contains("host-only file system (proc)"), "{error}");
        assert_eq!(entries_in_share(&share), 0);
    });
}
