//! Tests that the host neither opens devices, nor executes programs, nor follows symlinks in the share.

use std::{
    fs::{self, File},
    os::unix::fs::{OpenOptionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use serde_json::json;

use crate::container::prepare_tests::*;
use crate::volumes::*;

/// Returns the mounts at and below `dir` that lack `nosuid`, `nodev`, `noexec` or `nosymfollow`.
fn mounts_without_attributes(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let lacks = |line: &&str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let has = |attribute: &str| fields[5].split(',').any(|found| found == attribute);
        Path::new(fields[4]).starts_with(dir) && !["nosuid", "nodev", "noexec", "nosymfollow"].into_iter().all(has)
    };
    text.lines().filter(lacks).map(Into::into).collect()
}

/// Mounts a new ext4 file system at `point`, with shared propagation. The tests use ext4, because ext4 supports
/// id-mapped mounts.
fn ext4(dir: &Path, point: &Path) {
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    fs::create_dir(point).unwrap();
    for (program, before) in [("mkfs.ext4", &["-q", "-F"][..]), ("mount", &["-o", "loop"])] {
        let mut command = Command::new(program);
        let command = command.args(before).arg(&image);
        let command = if program == "mount" { command.arg(point) } else { command };
        assert!(command.status().unwrap().success(), "{program}");
    }
    mount(None::<&Path>, point, None::<&Path>, MsFlags::MS_SHARED, None::<&Path>).unwrap();
}

/// Prepares one container for each kind of rootfs. Each container mounts the directory `source` in every supported way.
/// Returns the containers' writable directories, as paths below `share.guest`.
fn prepare_every_kind(dir: &Path, share: &Share, source: &Path) -> Vec<PathBuf> {
    let id_mappings = json!([{ "containerID": 0, "hostID": 0, "size": 1000 }]);
    let bundle = bundle(dir, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let mut add = |source: &Path, options: &[&str]| {
            mounts.push(json!({"destination": "/x", "type": "bind", "source": source, "options": options}));
        };
        add(source, &["bind"]);
        add(source, &["rbind", "dev", "exec", "suid"]);
        add(source, &["rbind", "rslave"]);
        add(source, &["rbind", "ro"]);
        add(&source.join("file"), &["bind", "ro"]);
        let mut id_mapped = json!({"destination": "/x", "type": "bind", "source": source, "options": ["bind"]});
        (id_mapped["uidMappings"], id_mapped["gidMappings"]) = (id_mappings.clone(), id_mappings.clone());
        mounts.push(id_mapped);
    });
    let image = dir.join("rootfs-image");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status().unwrap().success());
    let mounted = |kind: &str, source: &Path, options: &[&str]| {
        let options = options.iter().map(ToString::to_string).collect();
        RootMount { kind: kind.into(), source: source.to_str().unwrap().into(), options, ..RootMount::default() }
    };
    let mut id_mapped = overlay(source, 2);
    id_mapped.options.extend(["uidmap=0:1000:1000".into(), "gidmap=0:1000:1000".into()]);
    let roots = [
        ("overlay", overlay(dir, 1)),
        ("layers", overlay(dir, 120)),
        ("id-mapped", id_mapped),
        ("bind", mounted("bind", source, &["rbind", "dev", "exec", "suid"])),
        ("loop", mounted("ext4", &image, &["loop"])),
    ];
    let mut seen = Vec::new();
    for (id, root) in roots {
        let prepared = prepare_from(&bundle, id, &share.host, &[root]).unwrap();
        seen.push(share.guest.join(id).join("rootfs"));
        seen.extend([2, 3, 4, 7].map(|index| guest_source(share, &prepared, index)));
    }
    seen
}

#[test]
fn every_mount_of_the_share_forbids_devices_programs_and_symlinks() {
    isolated(|dir| {
        let (share, source) = (share(dir), dir.join("source"));
        ext4(dir, &source);
        for name in ["before", "later"] {
            fs::create_dir(source.join(name)).unwrap();
        }
        tmpfs(&source.join("before"));
        fs::write(source.join("file"), "").unwrap();
        prepare_every_kind(dir, &share, &source);
        tmpfs(&source.join("later"));
        sync_mounts(&share.host).unwrap();
        let points = mounts_below(&share.guest);
        assert!(points.iter().any(|point| point.ends_with("/later")), "{points:?}");
        assert_eq!(mounts_without_attributes(&dir.join("sandbox/share")), Vec::<String>::new());
        assert_eq!(mounts_without_attributes(&dir.join("sandbox/guest")), Vec::<String>::new());
        // The host's mounts keep their flags.
        assert_eq!(mounts_without_attributes(&source).len(), 3);
        for id in ["overlay", "layers", "id-mapped", "bind", "loop"] {
            teardown(&share.host, id).unwrap();
        }
        share.unmount();
    });
}

#[test]
fn devices_and_symlinks_can_be_created_in_the_share_but_not_used_on_the_host() {
    isolated(|dir| {
        let (share, source) = (share(dir), dir.join("source"));
        ext4(dir, &source);
        fs::write(source.join("file"), "").unwrap();
        for seen in prepare_every_kind(dir, &share, &source) {
            let at = |name: &str| seen.join(format!("made-{name}"));
            // The device number of /dev/null is 1:3.
            let (mode, null) = (Mode::from_bits_truncate(0o666), makedev(1, 3));
            mknod(&at("device"), SFlag::S_IFCHR, mode, null).unwrap();
            fs::copy("/bin/true", at("program")).unwrap();
            symlink("/etc/passwd", at("link")).unwrap();
            for (name, error) in [("device", libc::EACCES), ("link", libc::ELOOP)] {
                assert_eq!(File::open(at(name)).unwrap_err().raw_os_error(), Some(error), "{}", at(name).display());
            }
            assert_eq!(Command::new(at("program")).status().unwrap_err().raw_os_error(), Some(libc::EACCES));
            assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("/etc/passwd"));
            // O_PATH with O_NOFOLLOW must open the symlink itself, because the VMM opens an O_PATH fd for each inode
            // that the guest uses.
            File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(at("link")).unwrap();
            for name in ["device", "program", "link"] {
                fs::remove_file(at(name)).unwrap();
            }
        }
        share.unmount();
    });
}
