//! Tests that containers that have a volume in several ways use one mount in the share, and when they do not.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::container::prepare::*;
use crate::container::prepare_tests::*;
use crate::oci::id_mappings::{IdMapping, IdMappings};
use crate::volumes::*;

/// A pod, with a volume on a tmpfs of its own.
struct Pod<'a> {
    dir: &'a Path,
    share: Share,
    volume: PathBuf,
}

impl<'a> Pod<'a> {
    fn new(dir: &'a Path) -> Self {
        let (share, volume) = (share(dir), dir.join("volume"));
        tmpfs(&volume);
        fs::create_dir_all(volume.join("sub/deep")).unwrap();
        fs::create_dir(volume.join("other")).unwrap();
        fs::write(volume.join("sub/file"), "text").unwrap();
        Self { dir, share, volume }
    }

    /// Prepares container `id`, which mounts `source`. Returns the path of the source below the guest's share.
    fn add(&self, id: &str, source: &Path, options: &[&str]) -> PathBuf {
        prepare_volume_for(id, self.dir, &self.share, source, options)
    }

    /// Bind-mounts `source` at a new directory with `name`, as the kubelet does for a subPath.
    fn bind(&self, source: &Path, name: &str) -> PathBuf {
        let point = self.dir.join("volume-subpaths/data").join(name).join("0");
        fs::create_dir_all(&point).unwrap();
        bind_at(source, &point);
        point
    }

    /// Returns the names of the volumes in the share.
    fn mounts(&self) -> HashSet<String> {
        let entries = fs::read_dir(self.share.host.join(shared_mounts::VOLUMES)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Checks that the containers `first` and `second` use different mounts. Then removes both containers.
    #[track_caller]
    fn assert_separate(&self, first: (&Path, &[&str]), second: (&Path, &[&str])) -> PathBuf {
        self.add("first", first.0, first.1);
        assert_eq!(self.mounts().len(), 1);
        let path = self.add("second", second.0, second.1);
        assert_eq!(self.mounts().len(), 2, "{first:?} and {second:?} share a mount");
        for id in ["first", "second"] {
            teardown(&self.share.host, id).unwrap();
        }
        assert_eq!(entries_in_share(&self.share), 0);
        path
    }
}

fn bind_at(source: &Path, point: &Path) {
    mount(Some(source), point, None::<&Path>, MsFlags::MS_BIND, None::<&Path>).unwrap();
}

fn remount(point: &Path, flags: MsFlags) {
    let none = None::<&Path>;
    mount(none, point, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none).unwrap();
}

#[test]
fn containers_use_the_mount_that_contains_their_source() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let whole = pod.add("whole", &pod.volume, &["rbind", "rw"]);
        let again = pod.bind(&pod.volume, "again");
        let read_only = pod.bind(&pod.volume.join("sub"), "read-only");
        remount(&read_only, MsFlags::MS_RDONLY);
        let no_exec = pod.bind(&pod.volume.join("sub"), "no-exec");
        remount(&no_exec, MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID);
        let all: [(&str, &Path, &[&str], &str); 9] = [
            ("read-only", &pod.volume, &["rbind", "ro"], ""),
            ("rro", &pod.volume, &["rbind", "rro"], ""),
            ("not-recursive", &pod.volume, &["bind", "noexec", "nosuid"], ""),
            ("another-mount", &again, &["rbind", "rw"], ""),
            ("part", &pod.volume.join("sub/deep"), &["rbind", "rw"], "sub/deep"),
            ("file", &pod.volume.join("sub/file"), &["rbind", "ro"], "sub/file"),
            ("sub-path", &pod.bind(&pod.volume.join("sub"), "sub"), &["rbind", "rw"], "sub"),
            ("read-only-sub-path", &read_only, &["rbind", "ro"], "sub"),
            ("no-exec-sub-path", &no_exec, &["rbind", "rw"], "sub"),
        ];
        for (id, source, options, below) in all {
            let expected = if below.is_empty() { whole.clone() } else { whole.join(below) };
            assert_eq!(pod.add(id, source, options), expected, "{id}");
        }
        assert_eq!(pod.mounts().len(), 1);
        assert!(whole.join("sub/deep").exists());
        // The mount stays until no container uses it.
        teardown(&pod.share.host, "whole").unwrap();
        for (id, ..) in all {
            assert!(whole.join("sub/deep").exists(), "the volume is gone, although container {id} still uses it");
            for _ in 0..2 {
                teardown(&pod.share.host, id).unwrap();
            }
        }
        assert_eq!((entries_in_share(&pod.share), mounts_below(&pod.share.host).len()), (0, 1));
    });
}

#[test]
fn containers_with_read_only_mounts_use_a_read_only_mount() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let whole = pod.add("whole", &pod.volume, &["rbind", "ro"]);
        assert_eq!(pod.add("part", &pod.volume.join("sub"), &["rbind", "ro"]), whole.join("sub"));
        assert_eq!(fs::write(whole.join("x"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
        // A container that may write gets a mount of its own. Later containers use the writable mount.
        let writable = pod.add("writable", &pod.volume, &["rbind", "rw"]);
        assert_ne!(writable, whole);
        assert_eq!(pod.add("file", &pod.volume.join("sub/file"), &["bind", "ro"]), writable.join("sub/file"));
    });
}

#[test]
fn mounts_of_one_container_meet_in_any_order() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let sub_path = pod.bind(&pod.volume.join("sub"), "sub");
        let sources =
            [(&sub_path, "rw"), (&pod.volume, "ro"), (&pod.volume.join("sub/deep"), "rw"), (&pod.volume, "rw")];
        let bundle = bundle(dir, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            for (source, option) in sources {
                mounts
                    .push(json!({"destination": "/x", "type": "bind", "source": source, "options": ["rbind", option]}));
            }
        });
        let (rootfs, host, pids) = ([overlay(dir, 1)], HostView::own(), HashMap::new());
        let request =
            Request { id: "c1", share: &pod.share.host, rootfs: &rootfs, host: &host, host_sockets: &[], pids: &pids };
        let prepared = prepare(&bundle, &request).unwrap();
        let [part, read_only, deep, whole] = [2, 3, 4, 5].map(|index| guest_source(&pod.share, &prepared, index));
        assert_eq!((part, read_only, deep), (whole.join("sub"), whole.clone(), whole.join("sub/deep")));
        assert_eq!(pod.mounts().len(), 1);
    });
}

#[test]
fn a_mount_that_came_first_does_not_grow() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let part = pod.volume.join("sub");
        // The first container may not have the rest of the volume, and may not write to it.
        pod.assert_separate((&part, &["rbind", "rw"]), (&pod.volume, &["rbind", "rw"]));
        pod.assert_separate((&pod.volume, &["rbind", "ro"]), (&pod.volume, &["rbind", "rw"]));
        pod.assert_separate((&pod.volume, &["rbind", "ro"]), (&part, &["rbind", "rw"]));
        // Only one of the containers sees the mounts that the host makes later.
        pod.assert_separate((&pod.volume, &["rbind", "rslave"]), (&part, &["rbind"]));
        pod.assert_separate((&pod.volume, &["rbind"]), (&pod.volume, &["rbind", "rslave"]));
        pod.assert_separate((&part, &["rbind"]), (&pod.volume.join("other"), &["rbind"]));
    });
}

#[test]
fn a_source_with_other_mounts_or_flags_gets_a_mount_of_its_own() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let (sub, deep) = (pod.volume.join("sub"), pod.volume.join("sub/deep"));
        let whole: (&Path, &[&str]) = (&pod.volume, &["rbind"]);
        let sub_path = pod.bind(&sub, "sub");
        // The host's mount does not allow what the container's option does.
        remount(&sub_path, MsFlags::MS_RDONLY);
        pod.assert_separate(whole, (&sub_path, &["rbind", "rw"]));
        remount(&sub_path, MsFlags::MS_NOATIME);
        pod.assert_separate(whole, (&sub_path, &["rbind", "rw"]));
        remount(&sub_path, MsFlags::MS_RELATIME);
        let deep_path = pod.bind(&deep, "deep");
        // A mount below the source, in both trees or in one of them.
        bind_at(&pod.volume.join("other"), &deep);
        pod.assert_separate(whole, (&sub, &["rbind"]));
        pod.assert_separate(whole, (&sub, &["bind"]));
        pod.assert_separate((&pod.volume, &["bind"]), (&sub, &["rbind"]));
        pod.assert_separate(whole, (&sub_path, &["rbind"]));
        // A mount of the same file system covers the path. The source is the directory below this mount.
        pod.assert_separate(whole, (&deep_path, &["rbind"]));
        umount2(&deep, MntFlags::MNT_DETACH).unwrap();
        // On the path, the directory is mounted on itself. The lookup would find the source, but in another mount.
        let deep_path = pod.bind(&deep, "covered");
        bind_at(&sub, &sub);
        pod.assert_separate(whole, (&deep_path, &["rbind"]));
        pod.assert_separate(whole, (&deep, &["rbind"]));
        umount2(&sub, MntFlags::MNT_DETACH).unwrap();
        // Another file system on the path covers the source, or contains the source.
        tmpfs(&sub);
        fs::create_dir(sub.join("deep")).unwrap();
        pod.assert_separate(whole, (&deep_path, &["rbind"]));
        pod.assert_separate(whole, (&deep, &["rbind"]));
        umount2(&sub, MntFlags::MNT_DETACH).unwrap();
        // A host-only file system below the source keeps its cover.
        mount(Some("proc"), &deep, Some("proc"), MsFlags::empty(), None::<&Path>).unwrap();
        pod.assert_separate(whole, (&sub, &["rbind"]));
        umount2(&deep, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_source_is_found_after_its_directory_was_moved() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let sub_path = pod.bind(&pod.volume.join("sub"), "sub");
        let whole = pod.add("whole", &pod.volume, &["rbind"]);
        fs::rename(pod.volume.join("sub"), pod.volume.join("moved")).unwrap();
        fs::create_dir(pod.volume.join("sub")).unwrap();
        assert_eq!(pod.add("part", &sub_path, &["rbind"]), whole.join("moved"));
    });
}

#[test]
fn parts_of_a_slave_volume_receive_later_mounts() {
    isolated(|dir| {
        let (share, root) = (share(dir), shared_mount(dir));
        fs::create_dir_all(root.join("sub/later")).unwrap();
        let options = ["rbind", "rslave"];
        let whole = prepare_volume_for("whole", dir, &share, &root, &options);
        let part = prepare_volume_for("part", dir, &share, &root.join("sub"), &options);
        assert_eq!((part, staged_trees(&share)), (whole.join("sub"), 1));
        teardown(&share.host, "whole").unwrap();
        tmpfs(&root.join("sub/later"));
        File::create(root.join("sub/later/file")).unwrap();
        sync_mounts(&share.host).unwrap();
        assert!(whole.join("sub/later/file").exists());
        teardown(&share.host, "part").unwrap();
        assert_eq!((entries_in_share(&share), staged_trees(&share)), (0, 0));
    });
}

#[test]
fn id_mapped_mounts_meet_only_with_the_same_mappings() {
    isolated(|dir| {
        let pod = Pod::new(dir);
        let add = |id: &str, source: &Path, host_id: Option<u32>| {
            let mut mount = json!({"destination": "/x", "type": "bind", "source": source, "options": ["bind"]});
            if let Some(host_id) = host_id {
                let mappings = json!([{ "containerID": 0, "hostID": host_id, "size": 1000 }]);
                (mount["uidMappings"], mount["gidMappings"]) = (mappings.clone(), mappings);
            }
            let bundle = bundle(dir, |spec| spec["mounts"].as_array_mut().unwrap().push(mount));
            let (rootfs, host, pids) = ([overlay(dir, 1)], HostView::own(), HashMap::new());
            let request =
                Request { id, share: &pod.share.host, rootfs: &rootfs, host: &host, host_sockets: &[], pids: &pids };
            guest_source(&pod.share, &prepare(&bundle, &request).unwrap(), 2)
        };
        let sub = pod.volume.join("sub");
        let whole = add("mapped", &pod.volume, Some(1000));
        assert_eq!(add("part", &sub, Some(1000)), whole.join("sub"));
        assert!(!add("other", &sub, Some(2000)).starts_with(&whole));
        assert!(!add("plain", &sub, None).starts_with(&whole));
        assert_eq!(pod.mounts().len(), 3);
        // A mount of the host has mappings.
        let on_host = dir.join("on-host");
        fs::create_dir(&on_host).unwrap();
        let mapping: Vec<IdMapping> =
            serde_json::from_value(json!([{ "containerID": 0, "hostID": 3000, "size": 1000 }])).unwrap();
        let namespace = IdMappings::from_mount(&mapping, &mapping).unwrap().unwrap().namespace().unwrap();
        let tree = mount_api::clone_tree(File::open(&pod.volume).unwrap().as_fd(), false).unwrap();
        mount_api::set_id_mapping(tree.as_fd(), namespace.as_fd(), false).unwrap();
        mount_api::attach(tree.as_fd(), File::open(&on_host).unwrap().as_fd()).unwrap();
        let mapped = add("host", &on_host, None);
        add("volume", &pod.volume, None);
        assert_eq!(pod.mounts().len(), 5);
        assert!(!add("part-of-host", &on_host.join("sub"), None).starts_with(&mapped));
        assert_eq!(pod.mounts().len(), 6);
    });
}
