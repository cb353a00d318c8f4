//! Tests the kinds of rootfs: overlays, directories and image files.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::container::prepare_tests::*;
use crate::volumes::*;

#[test]
fn prepare_mounts_an_overlay_whose_options_exceed_a_page() {
    isolated(|dir| {
        let share = share(dir);
        let rootfs = [overlay(dir, 120)];
        assert!(rootfs[0].options.join(",").len() > 4096);
        let bundle = bundle(dir, |_| ());
        let cwd = std::env::current_dir().unwrap();
        prepare_from(&bundle, "c1", &share.host, &rootfs).unwrap();
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
        let prepared = prepare_from(&bundle, "c1", &share.host, &[]).unwrap();
        assert_eq!(prepared.rootfs, "/run/husk/share/c1/host-rootfs");
        assert_eq!(prepared.spec["root"]["path"], "/run/husk/share/c1/host-rootfs");
        assert!(share.guest.join("c1/host-rootfs/here").exists());
        let ro = RootMount {
            kind: "bind".into(),
            source: root.to_str().unwrap().into(),
            options: vec!["rbind".into(), "ro".into()],
            ..RootMount::default()
        };
        prepare_from(&bundle, "c2", &share.host, &[ro]).unwrap();
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
        prepare_from(&bundle, "c3", &share.host, &[looped]).unwrap();
        assert!(share.guest.join("c3/rootfs/lost+found").exists());
        for id in ["c1", "c2", "c3"] {
            teardown(&share.host, id).unwrap();
        }
        assert_eq!(mounts_below(&share.host).len(), 1);
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
            prepare_from(&bundle(dir, |_| {}), id, &share.host, &mounts).unwrap();
        }
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
        for id in ["c1", "c2"] {
            assert_eq!(fs::read_dir(share.guest.join(id).join("rootfs/proc")).unwrap().count(), 0, "{id}");
            teardown(&share.host, id).unwrap();
        }
    });
}
