//! Real mounts in a mount namespace of the test's own: these tests need root, as `cargo xtask test` does.

use super::{load::tests::sample, *};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Runs `test` in a thread with a mount namespace of its own, in a fresh directory, as the shim's daemon would be.
fn isolated(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("mounts need root");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
    });
    thread.join().unwrap();
}

fn mounts_below(dir: &Path) -> Vec<String> {
    // A thread's own view: the process' main thread is in another namespace.
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
    Bundle::load(dir).unwrap()
}

/// Where the host has what mount `index` of a specification made ready is, as the guest sees it.
fn source(share: &Share, prepared: &Prepared, index: usize) -> PathBuf {
    let spec: Value = serde_json::from_slice(&prepared.spec).unwrap();
    let path = spec["mounts"][index]["source"].as_str().unwrap().to_owned();
    share.guest.join(Path::new(&path).strip_prefix(husk_proto::GUEST_SHARE).unwrap())
}

/// How much is in the share.
fn contents(share: &Share) -> usize {
    let count = |path: &Path| fs::read_dir(path).unwrap().count();
    // The directory of volumes itself is always there.
    count(&share.host) - 1 + count(&share.host.join(binds::VOLUMES))
}

fn share(dir: &Path) -> Share {
    let sandbox = dir.join("sandbox");
    fs::create_dir(&sandbox).unwrap();
    Share::mount(&sandbox).unwrap()
}

#[test]
fn mounts_are_made_seen_by_the_guest_and_taken_away() {
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
        let (second, third) = (source(&share, &prepared, 2), source(&share, &prepared, 3));
        assert_eq!(spec["mounts"][0], sample()["mounts"][0]);

        // What the guest sees, through the read-only copy of the share.
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
        // The same container again is refused, and the one there is left alone.
        assert!(matches!(prepare(&bundle, &request), Err(PrepareError::Create { .. })));
        assert!(guest.join("rootfs/new").exists());

        // A file that is held open does not keep anything.
        let held = fs::File::open(guest.join("rootfs/new")).unwrap();
        for _ in 0..2 {
            teardown(&share.host, "c1").unwrap();
            assert!(!share.host.join("c1").exists() && !guest.exists());
            assert_eq!(contents(&share), 0);
        }
        drop(held);
        assert!(data.join("below/deep").exists() && file.exists(), "the sources are untouched");
        assert_eq!(mounts_below(&dir.join("sandbox")).len(), 3);
        for _ in 0..2 {
            share.unmount();
            assert_eq!(mounts_below(&dir.join("sandbox")), Vec::<String>::new());
            assert!(!share.host.exists() && !share.guest.exists());
        }
    });
}

#[test]
fn mounts_of_a_failed_container_do_not_stay() {
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
        assert_eq!(contents(&share), 0);
        assert_eq!(mounts_below(&share.host).len(), 1);
        let broken = [RootMount { kind: "overlay".into(), ..RootMount::default() }];
        let error = prepare(&bundle, &Request { rootfs: &broken, ..request }).unwrap_err();
        assert!(matches!(error, PrepareError::Rootfs(_)), "{error}");
        assert_eq!(mounts_below(&share.host).len(), 1);
        share.unmount();
    });
}

#[test]
fn mounts_of_more_layers_than_fit_a_page() {
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
fn mounts_of_the_bundle_and_of_image_files() {
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
fn mounts_of_the_host_reach_slaves_only() {
    isolated(|dir| {
        let share = share(dir);
        let none = None::<&Path>;
        let source = dir.join("source");
        fs::create_dir(&source).unwrap();
        // As on a host: the source is shared, and what is mounted there later is the host's doing.
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
        assert!(self::source(&share, &prepared, 2).join("later/x").exists(), "a slave sees later mounts");
        assert!(!self::source(&share, &prepared, 3).join("later/x").exists(), "a private mount does not");
        teardown(&share.host, "c1").unwrap();
        assert!(source.join("later/x").exists(), "nothing goes back to the host");
        share.unmount();
    });
}

#[test]
fn mounts_of_one_directory_are_one_while_a_container_has_it() {
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
        let at = source(&share, &a, 2);
        assert_eq!((source(&share, &a, 3), source(&share, &b, 2)), (at.clone(), at.clone()));
        let read_only = source(&share, &make("c", &["rbind", "ro"]), 2);
        assert_ne!(read_only, at);
        fs::write(at.join("file"), "x").unwrap();
        assert!(fs::write(read_only.join("file"), "y").is_err());
        teardown(&share.host, "a").unwrap();
        assert!(at.join("file").exists(), "b has it still");
        teardown(&share.host, "b").unwrap();
        assert!(!at.exists() && read_only.join("file").exists());
        teardown(&share.host, "c").unwrap();
        assert_eq!(mounts_below(&share.host).len(), 1);
        assert_eq!(contents(&share), 0);
        share.unmount();
    });
}

/// Types of file systems that the host alone has, and what a test may mount of each without the host taking notice.
const OWN: [(&str, &str); 6] = [
    ("proc", "proc"),
    ("sysfs", "sys"),
    ("cgroup2", "cgroup"),
    ("devpts", "pts"),
    ("mqueue", "mqueue"),
    ("devtmpfs", "dev"),
];

/// A directory with one of each mounted below it, and a tmpfs with a file beside them.
fn with_the_hosts_own(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    let none = None::<&Path>;
    for (kind, name) in OWN {
        fs::create_dir_all(root.join(name)).unwrap();
        let options = (kind == "devpts").then_some("newinstance");
        mount(Some(kind), &root.join(name), Some(kind), MsFlags::empty(), options).unwrap();
    }
    // In what is left out, and over it: both go with it.
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

/// Has a volume of `root` made ready with these options; gives where the guest finds it.
fn volume(dir: &Path, share: &Share, root: &Path, options: &[&str]) -> PathBuf {
    let bundle = bundle(dir, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/host", "type": "bind", "source": root, "options": options}));
    });
    let rootfs = [overlay(dir, 1)];
    let request = Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() };
    let prepared = prepare(&bundle, &request).unwrap();
    assert_eq!(prepared.follows_mounts, options.contains(&"rslave"));
    source(share, &prepared, 2)
}

fn assert_nothing_of_the_hosts_own(volume: &Path, share: &Share) {
    for (_, name) in OWN {
        let found: Vec<_> = fs::read_dir(volume.join(name)).unwrap().collect();
        assert!(found.is_empty(), "{name}: {found:?}");
    }
    for place in [&share.host, &share.guest] {
        let kinds = mountinfo::read().unwrap();
        let kinds: Vec<_> = mountinfo::below(&kinds, place).into_iter().map(|entry| entry.kind.clone()).collect();
        assert!(!kinds.iter().any(|kind| OWN.iter().any(|(own, _)| own == kind)), "{kinds:?}");
    }
}

#[test]
fn a_volume_brings_no_file_system_of_the_hosts_own() {
    for options in [&["rbind", "ro"][..], &["rbind", "rw"], &["rbind", "rro"], &["rbind", "rslave", "rw"]] {
        isolated(move |dir| {
            let share = share(dir);
            let root = with_the_hosts_own(dir);
            let seen = volume(dir, &share, &root, options);
            assert_nothing_of_the_hosts_own(&seen, &share);
            assert_eq!(fs::read_to_string(seen.join("data/file")).unwrap(), "data");
            // The host keeps its own.
            assert!(root.join("proc/self").exists() && root.join("dev/null").exists());
            teardown(&share.host, "c1").unwrap();
            assert_eq!(contents(&share), 0);
            assert_eq!(fs::read_dir(tree::Stage::of(&share.host).dir()).unwrap().count(), 0);
        });
    }
}

/// A tmpfs in a mount that propagates, as those of a host do.
fn shared_mount(dir: &Path) -> PathBuf {
    let (root, none) = (dir.join("followed"), None::<&Path>);
    fs::create_dir(&root).unwrap();
    mount(Some("t"), &root, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &root, none, MsFlags::MS_SHARED, none).unwrap();
    root
}

#[test]
fn later_mounts_are_followed_but_for_the_hosts_own() {
    isolated(|dir| {
        let none = None::<&Path>;
        let share = share(dir);
        let root = shared_mount(dir);
        for name in ["proc", "late", "deep"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let seen = volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), none).unwrap();
        mount(Some("t"), &root.join("late"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::create_dir(root.join("late/below")).unwrap();
        mount(Some("t"), &root.join("late/below"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(root.join("late/below/file"), "late").unwrap();
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_to_string(seen.join("late/below/file")).unwrap(), "late");
        assert_eq!(fs::read_dir(seen.join("proc")).unwrap().count(), 0);
        // A second look changes nothing.
        let before = mounts_below(&share.guest);
        sync_mounts(&share.host).unwrap();
        assert_eq!(mounts_below(&share.guest), before);
        // The host can unmount what a guest has open.
        let held = fs::File::open(seen.join("late/below/file")).unwrap();
        for path in ["late/below", "late", "proc"] {
            nix::mount::umount(&root.join(path)).unwrap();
        }
        sync_mounts(&share.host).unwrap();
        assert_eq!(fs::read_dir(seen.join("late")).unwrap().count(), 0);
        drop(held);
        teardown(&share.host, "c1").unwrap();
        assert_eq!(contents(&share), 0);
    });
}

#[test]
fn a_link_of_the_guests_leads_no_mount_astray() {
    isolated(|dir| {
        let none = None::<&Path>;
        let share = share(dir);
        let root = shared_mount(dir);
        fs::create_dir_all(root.join("a/b")).unwrap();
        let outside = dir.join("outside");
        fs::create_dir_all(outside.join("b")).unwrap();
        let seen = volume(dir, &share, &root, &["rbind", "rslave", "rw"]);
        mount(Some("t"), &root.join("a/b"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        // In place of the directory in between, as a guest can write it.
        fs::rename(seen.join("a"), seen.join("moved")).unwrap();
        std::os::unix::fs::symlink(&outside, seen.join("a")).unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(mounts_below(&outside).is_empty());
        nix::mount::umount(&root.join("moved/b")).unwrap();
        sync_mounts(&share.host).unwrap();
        teardown(&share.host, "c1").unwrap();
    });
}

#[test]
fn a_volume_brings_nothing_of_the_sandboxs_share() {
    isolated(|dir| {
        let share = share(dir);
        let seen = volume(dir, &share, &dir.join("sandbox"), &["rbind", "ro"]);
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
        assert_eq!(contents(&share), 0);
    });
}

#[test]
fn a_root_file_system_brings_none_either() {
    isolated(|dir| {
        let share = share(dir);
        let root = with_the_hosts_own(dir);
        let bundle = bundle(dir, |spec| spec["root"]["path"] = json!(root));
        let request = Request { id: "c1", share: &share.host, rootfs: &[], pids: &HashMap::new() };
        let prepared = prepare(&bundle, &request).unwrap();
        let seen = share.guest.join("c1/rootfs");
        assert_nothing_of_the_hosts_own(&seen, &share);
        assert_eq!(fs::read_to_string(seen.join("data/file")).unwrap(), "data");
        assert!(prepared.notes.iter().any(|note| note.starts_with("/proc (proc)")), "{:?}", prepared.notes);
        teardown(&share.host, "c1").unwrap();
        let itself = RootMount {
            kind: "bind".into(),
            source: root.join("proc").to_string_lossy().into(),
            ..RootMount::default()
        };
        let request = Request { id: "c2", rootfs: &[itself], ..request };
        let error = crate::chain(&prepare(&bundle, &request).unwrap_err());
        assert!(error.contains("node's own (proc)"), "{error}");
        assert_eq!(contents(&share), 0);
    });
}

#[test]
fn a_root_file_system_receives_no_later_mounts() {
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
