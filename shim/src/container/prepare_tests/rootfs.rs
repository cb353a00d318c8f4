//! Tests the kinds of rootfs: overlays, directories and image files.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;

use crate::container::prepare::*;
use crate::container::prepare_tests::*;
use crate::volumes::*;

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
fn files_in_an_overlay_belong_to_their_creators_and_leave_reserved_blocks_free() {
    isolated(|dir| {
        let (share, disk) = (share(dir), dir.join("disk"));
        ext4(dir, &disk);
        let free_and_reserved = || {
            let stat = statvfs(&disk).unwrap();
            (stat.blocks_free(), stat.blocks_free() - stat.blocks_available())
        };
        let (_, reserved) = free_and_reserved();
        assert!(reserved > 50, "only {reserved} blocks are reserved");
        let rootfs = [overlay(&disk, 2)];
        let lower = PathBuf::from(rootfs[0].options[2].rsplit(':').next().unwrap());
        chown(lower.join("from-the-lowest"), Some(7), Some(8)).unwrap();
        prepare(
            &bundle(dir, |_| ()),
            &Request { id: "c1", share: &share.host, rootfs: &rootfs, pids: &HashMap::new() },
        )
        .unwrap();
        let seen = share.guest.join("c1/rootfs");
        let owner = |name: &str| {
            let metadata = fs::metadata(seen.join(name)).unwrap();
            (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
        };
        fs::create_dir(seen.join("new")).unwrap();
        // This copies the file to the upper layer.
        fs::set_permissions(seen.join("from-the-lowest"), fs::Permissions::from_mode(0o4711)).unwrap();
        assert_eq!((owner("new"), owner("from-the-lowest")), ((0, 0, 0o755), (7, 8, 0o4711)));
        fs::remove_file(seen.join("from-the-lowest")).unwrap();
        assert!(!seen.join("from-the-lowest").exists());
        let error = fs::write(seen.join("large"), vec![7; 16 << 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let (free, _) = free_and_reserved();
        assert!(free >= reserved, "{free} of {reserved} reserved blocks are free");
        teardown(&share.host, "c1").unwrap();
        share.unmount();
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
