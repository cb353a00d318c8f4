//! Tests a container's mounts and volumes: what the guest sees, and what a teardown leaves behind.

use std::{collections::HashMap, fs, time::Duration};

use serde_json::json;

use crate::container::prepare::*;
use crate::container::prepare_tests::*;
use crate::volumes::hanging_fs::HangingFileSystem;
use crate::volumes::*;

#[test]
fn prepare_makes_mounts_and_teardown_removes_them() {
    isolated(|dir| {
        let share = share(dir);
        let (data, file) = (dir.join("data"), dir.join("file"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(data.join("below")).unwrap();
        tmpfs(&data.join("below"));
        fs::write(data.join("below/deep"), "deep").unwrap();
        fs::write(&file, "file").unwrap();
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "rw"]}));
            mounts.push(json!({"destination": "/file", "type": "bind", "source": file, "options": ["bind", "ro"]}));
        });
        let rootfs = [overlay(dir, 3)];
        let prepared = prepare_from(&bundle, "c1", &share.host, &rootfs).unwrap();
        assert_eq!(prepared.rootfs, "/run/husk/share/c1/rootfs");
        let spec = &prepared.spec;
        let (second, third) = (guest_source(&share, &prepared, 2), guest_source(&share, &prepared, 3));
        assert_eq!(spec["mounts"][0], sample()["mounts"][0]);

        // Check what the guest sees. `share.guest` is a read-only slave mount of the share.
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
        // `prepare` rejects a second container with the same id, and does not change the first container.
        assert!(matches!(prepare_from(&bundle, "c1", &share.host, &rootfs), Err(PrepareError::Create { .. })));
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
fn prepare_removes_mounts_after_a_failure() {
    isolated(|dir| {
        let share = share(dir);
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/a", "type": "bind", "source": dir, "options": ["rbind"]}));
            mounts.push(json!({"destination": "/b", "type": "bind", "source": "/nowhere", "options": ["rbind"]}));
        });
        let rootfs = [overlay(dir, 2)];
        assert!(matches!(prepare_from(&bundle, "c1", &share.host, &rootfs), Err(PrepareError::Volume(_))));
        assert_eq!(entries_in_share(&share), 0);
        assert_eq!(mounts_below(&share.host).len(), 1);
        let broken = [RootMount { kind: "overlay".into(), ..RootMount::default() }];
        let error = prepare_from(&bundle, "c1", &share.host, &broken).unwrap_err();
        assert!(matches!(error, PrepareError::Rootfs(_)), "{error}");
        assert_eq!(mounts_below(&share.host).len(), 1);
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
            prepare(
                &with(options),
                &Request {
                    id,
                    share: &share.host,
                    rootfs: &rootfs,
                    host: &HostView::own(),
                    host_sockets: &[],
                    pids: &HashMap::new(),
                },
            )
            .unwrap()
        };
        let (a, b) = (make("a", &["rbind"]), make("b", &["rbind"]));
        let at = guest_source(&share, &a, 2);
        assert_eq!((guest_source(&share, &a, 3), guest_source(&share, &b, 2)), (at.clone(), at.clone()));
        let read_only = guest_source(&share, &make("c", &["rbind", "ro"]), 2);
        assert_eq!(read_only, at);
        fs::write(at.join("file"), "x").unwrap();
        teardown(&share.host, "a").unwrap();
        assert!(at.join("file").exists(), "the volume is gone, although container b still uses it");
        teardown(&share.host, "b").unwrap();
        assert!(at.join("file").exists(), "the volume is gone, although container c still uses it");
        teardown(&share.host, "c").unwrap();
        assert_eq!(mounts_below(&share.host).len(), 1);
        assert_eq!(entries_in_share(&share), 0);
        share.unmount();
    });
}

#[test]
fn a_hanging_file_system_delays_only_containers_that_use_it() {
    isolated(|dir| {
        let (share, stuck, other) = (share(dir), shared_mount(dir), dir.join("other"));
        fs::create_dir(&other).unwrap();
        let mut hanging = HangingFileSystem::mount(&stuck.join("hanging"));
        std::thread::scope(|scope| {
            let share = &share;
            let first = scope.spawn(|| prepare_volume_for("c1", dir, share, &stuck, &["rbind", "rslave"]));
            hanging.wait_for_request();
            let (done, finished) = std::sync::mpsc::channel();
            scope.spawn(move || {
                prepare_volume_for("c2", dir, share, &other, &["rbind", "rslave"]);
                teardown(&share.host, "c2").unwrap();
                done.send(()).unwrap();
            });
            let in_time = finished.recv_timeout(Duration::from_secs(10));
            drop(hanging);
            first.join().unwrap();
            assert!(in_time.is_ok(), "a container waited for a file system that it does not use");
        });
        teardown(&share.host, "c1").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}
