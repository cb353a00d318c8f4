//! Tests [`prepare`] with real mounts. Each test has its own mount namespace. The tests need root, as `cargo xtask
//! test` does.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

use super::prepare::*;
use crate::oci::Bundle;
use crate::oci::bundle::tests::sample;
use crate::volumes::*;

/// Runs `test` in a thread with a new directory and a new mount namespace. As in the shim's daemon, the propagation of
/// all mounts in this namespace is slave.
fn isolated(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root: it mounts");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
    });
    thread.join().unwrap();
}

fn mounts_below(dir: &Path) -> Vec<String> {
    // Reads the thread's mount list, because the process's main thread is in another namespace.
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let dir = dir.to_str().unwrap();
    text.lines().filter_map(|line| line.split(' ').nth(4)).filter(|at| at.starts_with(dir)).map(Into::into).collect()
}

fn overlay(dir: &Path, layers: usize) -> RootMount {
    let make = |name: &str| {
        let path = dir.join("snapshots-with-a-name-as-long-as-that-of-containerds-own-snapshotter").join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_string()
    };
    let lower: Vec<String> = (0..layers).map(|n| make(&format!("{n}/fs"))).collect();
    fs::write(Path::new(&lower[layers - 1]).join("from-the-lowest"), "x").unwrap();
    let options = vec![
        format!("workdir={}", make("work")),
        format!("upperdir={}", make("upper")),
        format!("lowerdir={}", lower.join(":")),
    ];
    RootMount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
}

fn bundle(dir: &Path, change: impl FnOnce(&mut Value)) -> Bundle {
    let mut value = sample();
    change(&mut value);
    fs::write(dir.join("config.json"), value.to_string()).unwrap();
    Bundle::read(dir).unwrap()
}

/// Returns the source of mount `index` of a prepared specification. The result is a host path in the guest's view of
/// the share.
fn guest_source(share: &Share, prepared: &Prepared, index: usize) -> PathBuf {
    let spec: Value = serde_json::from_slice(&prepared.spec).unwrap();
    let path = spec["mounts"][index]["source"].as_str().unwrap().to_owned();
    share.guest.join(Path::new(&path).strip_prefix(husk_proto::GUEST_SHARE).unwrap())
}

/// Returns the number of directories and files in the share.
fn entries_in_share(share: &Share) -> usize {
    let count = |path: &Path| fs::read_dir(path).unwrap().count();
    // The directory of volumes is not counted.
    count(&share.host) - 1 + count(&share.host.join(bind::VOLUMES))
}

/// Returns the number of trees in the staging directory.
fn staged_trees(share: &Share) -> usize {
    let dirs = fs::read_dir(stage::StagingDir::for_share(&share.host).dir()).unwrap();
    dirs.map(|dir| fs::read_dir(dir.unwrap().path()).unwrap().count()).sum()
}

fn share(dir: &Path) -> Share {
    let sandbox = dir.join("sandbox");
    fs::create_dir(&sandbox).unwrap();
    Share::mount(&sandbox).unwrap()
}

#[test]
fn prepare_mounts_for_the_guest_and_teardown_unmounts() {
    isolated(|dir| {
        let share = share(dir);
        let (data, file) = (dir.join("data"), dir.join("file"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(data.join("below")).unwrap();
        mount(Some("t"), &data.join("below"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(data.join("below/deep"), "deep").unwrap();
        fs::write(&file, "file").unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "rw"]}));
            mounts.push(json!({"destination": "/file", "type": "bind", "source": file, "options": ["bind", "ro"]}));
        });
        let rootfs = [overlay(dir, 3)];
        let request = Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() };
        let prepared = prepare(&bundle, &request).unwrap();
        assert_eq!(prepared.rootfs, "/run/husk/share/c1/rootfs");
        let spec: Value = serde_json::from_slice(&prepared.spec).unwrap();
        let (second, third) = (guest_source(&share, &prepared, 2), guest_source(&share, &prepared, 3));
        assert_eq!(spec["mounts"][0], sample()["mounts"][0]);

        // Checks the guest's view, through the read-only slave mount of the share.
        let guest = share.guest.join("c1");
        assert_eq!(fs::read_to_string(guest.join("rootfs/from-the-lowest")).unwrap(), "x");
        fs::write(guest.join("rootfs/new"), "new").unwrap();
        assert_eq!(fs::read_to_string(second.join("below/deep")).unwrap(), "deep");
        fs::write(second.join("from-guest"), "g").unwrap();
        assert!(data.join("from-guest").exists());
        assert_eq!(fs::read_to_string(&third).unwrap(), "file");
        for refused in [fs::write(&third, "no"), fs::write(guest.join("x"), "no"), fs::remove_dir(&guest)] {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EROFS));
        }
        // A second container with the same id is rejected, and the first is unchanged.
        assert!(matches!(prepare(&bundle, &request), Err(PrepareError::Create { .. })));
        assert!(guest.join("rootfs/new").exists());

        // An open file does not prevent the teardown.
        let held = fs::File::open(guest.join("rootfs/new")).unwrap();
        for _ in 0..2 {
            teardown(&share.host, "c1").unwrap();
            assert!(!share.host.join("c1").exists() && !guest.exists());
            assert_eq!(entries_in_share(&share), 0);
        }
        drop(held);
        assert!(data.join("below/deep").exists() && file.exists(), "the teardown has removed the sources");
        assert_eq!(mounts_below(&dir.join("sandbox")).len(), 3);
        for _ in 0..2 {
            share.unmount();
            assert_eq!(mounts_below(&dir.join("sandbox")), Vec::<String>::new());
            assert!(!share.host.exists() && !share.guest.exists());
        }
    });
}

#[test]
fn prepare_unmounts_after_a_failure() {
    isolated(|dir| {
        let share = share(dir);
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/a", "type": "bind", "source": dir, "options": ["rbind"]}));
            mounts.push(json!({"destination": "/b", "type": "bind", "source": "/nowhere", "options": ["rbind"]}));
        });
        let rootfs = [overlay(dir, 2)];
        let request = Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() };
        assert!(matches!(prepare(&bundle, &request), Err(PrepareError::Volume(_))));
        assert_eq!(entries_in_share(&share), 0);
        assert_eq!(mounts_below(&share.host).len(), 1);
        let broken = [RootMount { kind: "overlay".into(), ..RootMount::default() }];
        let error = prepare(&bundle, &Request { rootfs: &broken, ..request }).unwrap_err();
        assert!(matches!(error, PrepareError::Rootfs(_)), "{error}");
        assert_eq!(mounts_below(&share.host).len(), 1);
        share.unmount();
    });
}

#[test]
fn prepare_mounts_layers_whose_options_exceed_a_page() {
    isolated(|dir| {
        let share = share(dir);
        let rootfs = [overlay(dir, 120)];
        assert!(rootfs[0].options.join(",").len() > 4096);
        let bundle = bundle(dir, |_| ());
        let cwd = std::env::current_dir().unwrap();
        prepare(&bundle, &Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() }).unwrap();
        assert!(share.guest.join("c1/rootfs/from-the-lowest").exists());
        assert_eq!(std::env::current_dir().unwrap(), cwd);
        teardown(&share.host, "c1").unwrap();
        share.unmount();
    });
}

#[test]
fn prepare_mounts_a_rootfs_from_the_bundle_or_an_image_file() {
    isolated(|dir| {
        let share = share(dir);
        let root = dir.join("rootfs");
        fs::create_dir(&root).unwrap();
        fs::write(root.join("here"), "").unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        let bundle = bundle(dir, |_| ());
        prepare(&bundle, &Request { id: "c1", share: &share.host, rootfs: &[], pids: &HashMap::new() }).unwrap();
        assert!(share.guest.join("c1/rootfs/here").exists());
        let ro = RootMount {
            kind: "bind".into(),
            source: root.to_str().unwrap().into(),
            options: vec!["rbind".into(), "ro".into()],
            ..RootMount::default()
        };
        prepare(&bundle, &Request { id: "c2", share: &share.host, rootfs: &[ro], pids: &HashMap::new() }).unwrap();
        let error = fs::write(share.guest.join("c2/rootfs/no"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let image: PathBuf = dir.join("image");
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let made = std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status().unwrap();
        assert!(made.success());
        let looped = RootMount {
            kind: "ext4".into(),
            source: image.to_str().unwrap().into(),
            options: vec!["loop".into()],
            ..RootMount::default()
        };
        prepare(&bundle, &Request { id: "c3", share: &share.host, rootfs: &[looped], pids: &HashMap::new() }).unwrap();
        assert!(share.guest.join("c3/rootfs/lost+found").exists());
        for id in ["c1", "c2", "c3"] {
            teardown(&share.host, id).unwrap();
        }
        assert_eq!(mounts_below(&share.host).len(), 1);
        share.unmount();
    });
}

#[test]
fn later_mounts_propagate_to_slave_volumes_only() {
    isolated(|dir| {
        let share = share(dir);
        let none = None::<&Path>;
        let source = dir.join("source");
        fs::create_dir(&source).unwrap();
        // The source has shared propagation, as mounts on a host usually have.
        mount(Some("t"), &source, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, &source, none, MsFlags::MS_SHARED, none).unwrap();
        fs::create_dir(source.join("later")).unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            for mode in ["rslave", "rprivate"] {
                let options = ["rbind", mode];
                mounts.push(json!({"destination": "/a", "type": "bind", "source": source, "options": options}));
            }
        });
        let rootfs = [overlay(dir, 1)];
        let prepared =
            prepare(&bundle, &Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() })
                .unwrap();
        mount(Some("t"), &source.join("later"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(source.join("later/x"), "").unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(
            guest_source(&share, &prepared, 2).join("later/x").exists(),
            "the slave mount did not receive the later mount"
        );
        assert!(
            !guest_source(&share, &prepared, 3).join("later/x").exists(),
            "the private mount received the later mount"
        );
        teardown(&share.host, "c1").unwrap();
        assert!(source.join("later/x").exists(), "the teardown has unmounted a mount of the host");
        share.unmount();
    });
}

#[test]
fn containers_share_one_mount_of_a_directory() {
    isolated(|dir| {
        let share = share(dir);
        let data = dir.join("data");
        fs::create_dir(&data).unwrap();
        let with = |options: &[&str]| {
            bundle(dir, |spec| {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                for at in ["/one", "/two"] {
                    mounts.push(json!({"destination": at, "type": "bind", "source": data, "options": options}));
                }
            })
        };
        let make = |id: &str, options: &[&str]| {
            let rootfs = [overlay(dir, 1)];
            prepare(&with(options), &Request { id, share: &share.host, rootfs: &rootfs, pids: &HashMap::new() })
                .unwrap()
        };
        let (a, b) = (make("a", &["rbind"]), make("b", &["rbind"]));
        let at = guest_source(&share, &a, 2);
        assert_eq!((guest_source(&share, &a, 3), guest_source(&share, &b, 2)), (at.clone(), at.clone()));
        let read_only = guest_source(&share, &make("c", &["rbind", "ro"]), 2);
        assert_ne!(read_only, at);
        fs::write(at.join("file"), "x").unwrap();
        assert!(fs::write(read_only.join("file"), "y").is_err());
        teardown(&share.host, "a").unwrap();
        assert!(at.join("file").exists(), "the volume is gone, although container b still uses it");
        teardown(&share.host, "b").unwrap();
        assert!(!at.exists() && read_only.join("file").exists());
        teardown(&share.host, "c").unwrap();
        assert_eq!(mounts_below(&share.host).len(), 1);
        assert_eq!(entries_in_share(&share), 0);
        share.unmount();
    });
}

/// Host-only file system types, each with the name of the directory on which a test mounts it. These mounts have no
/// effect on the host.
const HOST_ONLY: [(&str, &str); 6] = [
    ("proc", "proc"),
    ("sysfs", "sys"),
    ("cgroup2", "cgroup"),
    ("devpts", "pts"),
    ("mqueue", "mqueue"),
    ("devtmpfs", "dev"),
];

/// Creates a directory on which one file system of each host-only type is mounted, and a tmpfs with a file.
fn mount_host_only(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    let none = None::<&Path>;
    for (kind, name) in HOST_ONLY {
        fs::create_dir_all(root.join(name)).unwrap();
        let options = (kind == "devpts").then_some("newinstance");
        mount(Some(kind), &root.join(name), Some(kind), MsFlags::empty(), options).unwrap();
    }
    // A tmpfs that covers a host-only mount, and a tmpfs inside a host-only mount, are excluded with that mount.
    mount(Some("t"), &root.join("dev/shm"), Some("tmpfs"), MsFlags::empty(), none)
        .or_else(|_| {
            fs::create_dir(root.join("dev/shm"))?;
            mount(Some("t"), &root.join("dev/shm"), Some("tmpfs"), MsFlags::empty(), none).map_err(std::io::Error::from)
        })
        .unwrap();
    mount(Some("t"), &root.join("sys"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::create_dir(root.join("data")).unwrap();
    mount(Some("t"), &root.join("data"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::write(root.join("data/file"), "data").unwrap();
    root
}

/// Prepares a container with a volume of `root` and these options. Returns the volume's path in the guest's view.
fn prepare_volume(dir: &Path, share: &Share, root: &Path, options: &[&str]) -> PathBuf {
    let bundle = bundle(dir, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/host", "type": "bind", "source": root, "options": options}));
    });
    let rootfs = [overlay(dir, 1)];
    let request = Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() };
    let prepared = prepare(&bundle, &request).unwrap();
    assert_eq!(prepared.needs_propagation, options.contains(&"rslave"));
    guest_source(share, &prepared, 2)
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

/// Mounts a tmpfs with shared propagation, which mounts on a host usually have.
fn shared_mount(dir: &Path) -> PathBuf {
    let (root, none) = (dir.join("shared"), None::<&Path>);
    fs::create_dir(&root).unwrap();
    mount(Some("t"), &root, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &root, none, MsFlags::MS_SHARED, none).unwrap();
    root
}

#[test]
fn sync_propagates_later_mounts_except_host_only_ones() {
    isolated(|dir| {
        let none = None::<&Path>;
        let share = share(dir);
        let root = shared_mount(dir);
        for name in ["proc", "late", "deep"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), none).unwrap();
        mount(Some("t"), &root.join("late"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::create_dir(root.join("late/below")).unwrap();
        mount(Some("t"), &root.join("late/below"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(root.join("late/below/file"), "late").unwrap();
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_to_string(seen.join("late/below/file")).unwrap(), "late");
        assert_eq!(fs::read_dir(seen.join("proc")).unwrap().count(), 0);
        // A second update changes nothing.
        let before = mounts_below(&share.guest);
        sync_mounts(&share.host).unwrap();
        assert_eq!(mounts_below(&share.guest), before);
        // The host can unmount a file system on which a guest has an open file.
        let held = fs::File::open(seen.join("late/below/file")).unwrap();
        for path in ["late/below", "late", "proc"] {
            nix::mount::umount(&root.join(path)).unwrap();
        }
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_dir(seen.join("late")).unwrap().count(), 0);
        drop(held);
        teardown(&share.host, "c1").unwrap();
        assert_eq!(entries_in_share(&share), 0);
    });
}

#[test]
fn sync_propagates_mounts_that_cover_other_mounts() {
    isolated(|dir| {
        let share = share(dir);
        let root = shared_mount(dir);
        fs::create_dir_all(root.join("a/b")).unwrap();
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        let tmpfs = |path: &str, file: &str| {
            mount(Some("t"), &root.join(path), Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
            fs::write(root.join(path).join(file), "").unwrap();
            sync_mounts(&share.host).unwrap();
        };
        tmpfs("a/b", "first");
        assert!(seen.join("a/b/first").exists());
        tmpfs("a/b", "second");
        assert!(seen.join("a/b/second").exists());
        tmpfs("a", "third");
        assert!(seen.join("a/third").exists() && !seen.join("a/b").exists());
        // The next mount covers the root of the volume.
        tmpfs("", "fourth");
        assert!(seen.join("fourth").exists() && !seen.join("a").exists());
        for (path, file) in [("", "a/third"), ("a", "a/b/second"), ("a/b", "a/b/first")] {
            nix::mount::umount(&root.join(path)).unwrap();
            sync_mounts(&share.host).unwrap();
            assert!(seen.join(file).exists(), "{file}");
        }
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn sync_ignores_covered_host_only_mounts() {
    for options in [&["rbind", "rw"][..], &["rbind", "rslave", "rw"]] {
        isolated(move |dir| {
            let share = share(dir);
            let (root, none) = (shared_mount(dir), None::<&Path>);
            fs::create_dir_all(root.join("run/netns")).unwrap();
            // `ip netns` creates mounts like this below /run.
            fs::write(root.join("run/netns/a"), "").unwrap();
            mount(Some("/proc/self/ns/net"), &root.join("run/netns/a"), none, MsFlags::MS_BIND, none).unwrap();
            mount(Some("t"), &root.join("run"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
            fs::write(root.join("run/file"), "").unwrap();
            let seen = prepare_volume(dir, &share, &root, options);
            assert!(seen.join("run/file").exists());
            sync_mounts(&share.host).unwrap();
            nix::mount::umount(&root.join("run")).unwrap();
            sync_mounts(&share.host).unwrap();
            if options.contains(&"rslave") {
                assert_eq!(fs::read(seen.join("run/netns/a")).unwrap(), b"", "the namespace's file is mounted");
            }
            teardown(&share.host, "c1").unwrap();
            assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
        });
    }
}

#[test]
fn sync_restores_a_submount_whose_parent_was_replaced() {
    isolated(|dir| {
        let (share, root, none) = (share(dir), shared_mount(dir), None::<&Path>);
        let child = dir.join("child");
        for directory in [&root.join("a"), &child] {
            fs::create_dir(directory).unwrap();
        }
        mount(Some("t"), &child, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(child.join("file"), "").unwrap();
        let mount_both = || {
            mount(Some("t"), &root.join("a"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
            fs::create_dir(root.join("a/b")).unwrap();
            mount(Some(&child), &root.join("a/b"), none, MsFlags::MS_BIND, none).unwrap();
        };
        mount_both();
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        assert!(seen.join("a/b/file").exists());
        nix::mount::umount2(&root.join("a"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        mount_both();
        sync_mounts(&share.host).unwrap();
        assert!(seen.join("a/b/file").exists());
        teardown(&share.host, "c1").unwrap();
    });
}

#[test]
fn a_host_only_rootfs_or_layer_is_rejected() {
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
fn sync_does_not_wait_for_a_hanging_file_system() {
    isolated(|dir| {
        let share = share(dir);
        let root = shared_mount(dir);
        for name in ["hung", "late"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        // No server answers the requests of this file system.
        let server = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", std::os::fd::AsRawFd::as_raw_fd(&server));
        mount(Some("hung"), &root.join("hung"), Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
        mount(Some("t"), &root.join("late"), Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
        fs::write(root.join("late/file"), "").unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(seen.join("late/file").exists());
        assert!(mounts_below(&share.guest).iter().any(|point| point.ends_with("/hung")));
        nix::mount::umount(&root.join("late")).unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(!seen.join("late/file").exists());
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn sync_tolerates_concurrent_volume_changes() {
    isolated(|dir| {
        let (share, root) = (share(dir), shared_mount(dir));
        for at in 0..8 {
            fs::create_dir(root.join(at.to_string())).unwrap();
        }
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            let options = ["rbind", "rslave"];
            mounts.push(json!({"destination": "/host", "type": "bind", "source": root, "options": options}));
        });
        std::thread::scope(|scope| {
            let (bundle, host) = (&bundle, &share.host);
            let churn = scope.spawn(move || {
                for round in 0..40 {
                    let id = format!("c{round}");
                    let rootfs = [overlay(dir, 1)];
                    let request = Request { id: &id, share: host, rootfs: &rootfs, pids: &HashMap::new() };
                    prepare(bundle, &request).unwrap();
                    teardown(host, &id).unwrap();
                }
            });
            let mut round = 0;
            while !churn.is_finished() {
                let point = root.join((round % 8).to_string());
                mount(Some("t"), &point, Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
                // A call may fail if it sees only a part of a change. The next call then applies the whole change.
                let _ = sync_mounts(host);
                nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).unwrap();
                let _ = sync_mounts(host);
                round += 1;
            }
        });
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
        assert_eq!(mounts_below(&share.host).len(), 1);
    });
}

#[test]
fn volumes_exclude_the_sandboxs_share() {
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

#[test]
fn rootfs_receives_no_later_mounts() {
    isolated(|dir| {
        let share = share(dir);
        let root = shared_mount(dir);
        fs::create_dir(root.join("proc")).unwrap();
        let source = root.to_string_lossy().into_owned();
        for (id, option) in [("c1", "bind"), ("c2", "rbind")] {
            let (kind, source, options) = ("bind".into(), source.clone(), vec![option.into()]);
            let mounts = [RootMount { kind, source, options, ..RootMount::default() }];
            let request = Request { id, share: &share.host, rootfs: &mounts, pids: &HashMap::new() };
            prepare(&bundle(dir, |_| {}), &request).unwrap();
        }
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
        for id in ["c1", "c2"] {
            assert_eq!(fs::read_dir(share.guest.join(id).join("rootfs/proc")).unwrap().count(), 0, "{id}");
            teardown(&share.host, id).unwrap();
        }
    });
}
