//! Tests that volumes with `rslave` propagation receive the mounts that the host makes after the container's creation.

use std::{fs, path::Path};

use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::container::prepare_tests::*;
use crate::volumes::*;

#[test]
fn later_mounts_propagate_to_slave_volumes_only() {
    isolated(|dir| {
        let share = share(dir);
        let none = None::<&Path>;
        let source = dir.join("source");
        fs::create_dir(&source).unwrap();
        // Give the source shared propagation, because most mounts of a host have shared propagation.
        tmpfs(&source);
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
        let prepared = prepare_from(&bundle, "c1", &share.host, &rootfs).unwrap();
        tmpfs(&source.join("later"));
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
        assert!(source.join("later/x").exists(), "the teardown has unmounted a file system of the host");
        share.unmount();
    });
}

#[test]
fn sync_propagates_later_mounts_except_host_only_mounts() {
    isolated(|dir| {
        let none = None::<&Path>;
        let share = share(dir);
        let root = shared_mount(dir);
        for name in ["proc", "late", "deep"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), none).unwrap();
        tmpfs(&root.join("late"));
        fs::create_dir(root.join("late/below")).unwrap();
        tmpfs(&root.join("late/below"));
        fs::write(root.join("late/below/file"), "late").unwrap();
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_to_string(seen.join("late/below/file")).unwrap(), "late");
        assert_eq!(fs::read_dir(seen.join("proc")).unwrap().count(), 0);
        // Without a new mount, an update changes nothing.
        let before = mounts_below(&share.guest);
        sync_mounts(&share.host).unwrap();
        assert_eq!(mounts_below(&share.guest), before);
        // The host can unmount a file system although the guest has an open file on this file system.
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
fn sync_propagates_a_mount_that_covers_a_host_only_mount() {
    isolated(|dir| {
        let (share, root) = (share(dir), shared_mount(dir));
        fs::create_dir(root.join("proc")).unwrap();
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
        let seen = prepare_volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        tmpfs(&root.join("proc"));
        fs::write(root.join("proc/file"), "").unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(seen.join("proc/file").exists());
        nix::mount::umount(&root.join("proc")).unwrap();
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_dir(seen.join("proc")).unwrap().count(), 0);
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn receiving_trees_exclude_the_mounts_of_the_sandbox() {
    isolated(|dir| {
        let share = share(dir);
        let sandbox = dir.join("sandbox");
        prepare_volume(dir, &share, &sandbox, &["rbind", "rslave", "rw"]);
        let receiving = staging_dir::StagingDir::for_share(&share.host).dir().join("receiving");
        assert_eq!(mounts_below(&receiving).len(), 1, "{:?}", mounts_below(&receiving));
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
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
            tmpfs(&root.join(path));
            fs::write(root.join(path).join(file), "").unwrap();
            sync_mounts(&share.host).unwrap();
        };
        tmpfs("a/b", "first");
        assert!(seen.join("a/b/first").exists());
        tmpfs("a/b", "second");
        assert!(seen.join("a/b/second").exists());
        tmpfs("a", "third");
        assert!(seen.join("a/third").exists() && !seen.join("a/b").exists());
        // This mount covers the volume's root.
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
            // Bind-mount a network namespace below `run`, as `ip netns` does below `/run`.
            fs::write(root.join("run/netns/a"), "").unwrap();
            mount(Some("/proc/self/ns/net"), &root.join("run/netns/a"), none, MsFlags::MS_BIND, none).unwrap();
            tmpfs(&root.join("run"));
            fs::write(root.join("run/file"), "").unwrap();
            let seen = prepare_volume(dir, &share, &root, options);
            assert!(seen.join("run/file").exists());
            sync_mounts(&share.host).unwrap();
            nix::mount::umount(&root.join("run")).unwrap();
            sync_mounts(&share.host).unwrap();
            if options.contains(&"rslave") {
                assert_eq!(fs::read(seen.join("run/netns/a")).unwrap(), b"", "the network namespace is visible");
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
        tmpfs(&child);
        fs::write(child.join("file"), "").unwrap();
        let mount_both = || {
            tmpfs(&root.join("a"));
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
        tmpfs(&root.join("late"));
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
                    prepare_from(bundle, &id, host, &rootfs).unwrap();
                    teardown(host, &id).unwrap();
                }
            });
            let mut round = 0;
            while !churn.is_finished() {
                let point = root.join((round % 8).to_string());
                tmpfs(&point);
                // Ignore a failure, because the mounts may change during the update.
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
