//! Tests of mounts of one file system that are joined: the guest has one node for one file ([`super::joins`]).

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::hanging_fs::enter_mount_namespace;
use super::test_guest::*;
use super::test_tree::mknod;
use crate::jail::restrict;

/// FUSE_ATTR_SUBMOUNT of include/uapi/linux/fuse.h.
const SUBMOUNT: u32 = 1;
const PART: &str = "0-wg.part";
const WHOLE: &str = "1-wg.whole";

/// A share with mounts of the directory `volume` of the host.
struct Share {
    base: tempfile::TempDir,
    mounts: Vec<PathBuf>,
}

/// What the guest learns from a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    node: u64,
    group: u32,
}

impl Share {
    fn new() -> Self {
        enter_mount_namespace();
        let share = Self { base: tempfile::tempdir().unwrap(), mounts: Vec::new() };
        fs::create_dir_all(share.root().join(".volumes")).unwrap();
        let part = share.volume().join("part");
        fs::create_dir_all(part.join("directory")).unwrap();
        fs::write(part.join("file"), "content").unwrap();
        fs::write(part.join("directory/inner"), "content").unwrap();
        mknod(&part.join("fifo"), libc::S_IFIFO | 0o666, 0).unwrap();
        share
    }

    fn root(&self) -> PathBuf {
        self.base.path().join("share")
    }

    fn volume(&self) -> PathBuf {
        self.base.path().join("volume")
    }

    /// Binds a directory below `volume` as mount `name` of the share.
    fn bind(&mut self, below: &str, name: &str) {
        let point = self.root().join(".volumes").join(name);
        fs::create_dir(&point).unwrap();
        mount(Some(&self.volume().join(below)), &point, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        self.mounts.push(point.clone());
        if name.contains("-r") {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &point, None::<&str>, flags, None::<&str>).unwrap();
        }
    }

    fn guest(&self) -> Guest {
        let mut guest = Guest::with_share(&self.root(), 1);
        guest.init();
        guest
    }

    /// Runs a guest whose VMM has the landlock rules of the jail. The function's second argument unmounts a mount.
    fn confined(&mut self, run: impl FnOnce(&mut Guest, &dyn Fn(&str)) + Send) {
        let (root, belongings) = (self.root(), belongings());
        let (names, to_unmount) = mpsc::channel::<String>();
        let (unmounted, result) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                restrict(Some(&root), false).unwrap();
                let mut guest = Guest::with_belongings(&root, 1, belongings);
                guest.init();
                run(&mut guest, &|name| {
                    names.send(name.to_owned()).unwrap();
                    result.recv().unwrap();
                });
            });
            // A thread with landlock rules cannot unmount.
            for name in to_unmount {
                let point = self.root().join(".volumes").join(name);
                umount2(&point, MntFlags::MNT_DETACH).unwrap();
                fs::remove_dir(&point).unwrap();
                self.mounts.retain(|other| *other != point);
                unmounted.send(()).unwrap();
            }
        });
    }

    /// Returns the number of files of the share that this process has open.
    fn open_files(&self) -> usize {
        let is_of_share = |path: &Path| path.starts_with(self.base.path());
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter(|entry| fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|path| is_of_share(&path)))
            .count()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        for point in &self.mounts {
            umount2(point, MntFlags::MNT_DETACH).unwrap();
        }
    }
}

fn find(guest: &mut Guest, parent: u64, name: &str) -> Found {
    let (error, entry) = guest.call(LOOKUP, parent, format!("{name}\0").as_bytes(), 128);
    assert_eq!(error, 0, "LOOKUP of {name} failed");
    let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
    // `attr.rdev` and `attr.flags` of `struct fuse_entry_out`.
    let group = if word(124) & SUBMOUNT != 0 { word(116) } else { 0 };
    Found { node: u64_at(&entry, 0), group }
}

fn find_path(guest: &mut Guest, from: u64, path: &str) -> u64 {
    path.split('/').fold(from, |node, name| find(guest, node, name).node)
}

/// Looks up a mount of the share.
fn find_mount(guest: &mut Guest, name: &str) -> Found {
    let volumes = find(guest, ROOT, ".volumes").node;
    find(guest, volumes, name)
}

fn forget(guest: &mut Guest, node: u64, count: u64) {
    let body = longs([count]);
    let header = guest.header(FORGET, node, body.len());
    guest.bench.queues[1].add(&[&header, &body], &[]);
    guest.bench.run_until(|queues| queues[1].poll().is_some());
}

fn rename(guest: &mut Guest, (from, name): (u64, &str), (to, new_name): (u64, &str)) -> i32 {
    let body = [longs([to]), format!("{name}\0{new_name}\0").into_bytes()].concat();
    guest.error(RENAME, from, &body)
}

fn open_error(guest: &mut Guest, node: u64, flags: i32) -> i32 {
    guest.error(OPEN, node, &words([flags.cast_unsigned(), 0]))
}

fn write(guest: &mut Guest, node: u64, handle: u64, data: &[u8]) -> i32 {
    let body = [longs([handle, 0]), words([data.len() as u32, 0, 0, 0, 0, 0]), data.to_vec()].concat();
    guest.error(WRITE, node, &body)
}

fn release(guest: &mut Guest, node: u64, handle: u64) -> i32 {
    guest.error(RELEASE, node, &[longs([handle]), words([0, 0, 0, 0])].concat())
}

#[test]
fn file_has_one_node_whatever_mount_comes_first() {
    for names in [[("part", PART), ("", WHOLE)], [("", WHOLE), ("part", PART)]] {
        let mut share = Share::new();
        share.bind(names[0].0, names[0].1);
        let mut guest = share.guest();
        let path = |below: &str, path: &str| if below.is_empty() { format!("part/{path}") } else { path.to_owned() };
        let first = find_mount(&mut guest, names[0].1);
        let files = ["file", "fifo", "directory", "directory/inner"];
        let nodes = files.map(|file| find_path(&mut guest, first.node, &path(names[0].0, file)));
        share.bind(names[1].0, names[1].1);
        let second = find_mount(&mut guest, names[1].1);
        assert!(first.group != 0 && first.group == second.group, "{first:?} {second:?}");
        let again = files.map(|file| find_path(&mut guest, second.node, &path(names[1].0, file)));
        assert_eq!(nodes, again, "{names:?}");
        // The part is a directory of the whole.
        let whole = if names[0].0.is_empty() { first } else { second };
        let part = if names[0].0.is_empty() { second } else { first };
        assert_eq!(find(&mut guest, whole.node, "part"), Found { node: part.node, group: 0 });
        for (name, expected) in [(names[0].1, first), (names[1].1, second)] {
            assert_eq!(find_mount(&mut guest, name), expected);
        }
        // A file that the guest finds first after the join.
        fs::write(share.volume().join("part/new"), "").unwrap();
        let new = find_path(&mut guest, whole.node, "part/new");
        assert_eq!(find(&mut guest, part.node, "new").node, new);
    }
}

#[test]
fn rename_and_link_cross_the_border_of_a_part() {
    let mut share = Share::new();
    share.bind("part", PART);
    let mut guest = share.guest();
    let part = find_mount(&mut guest, PART);
    // The guest keeps these directories in its cache, and does not look them up again.
    let directory = find(&mut guest, part.node, "directory").node;
    let inner = find(&mut guest, directory, "inner").node;
    share.bind("", WHOLE);
    let whole = find_mount(&mut guest, WHOLE);
    find(&mut guest, whole.node, "part");
    assert_eq!(rename(&mut guest, (directory, "inner"), (whole.node, "moved")), 0);
    assert_eq!(rename(&mut guest, (whole.node, "moved"), (directory, "back")), 0);
    assert_eq!(find(&mut guest, directory, "back").node, inner);
    let file = find(&mut guest, part.node, "file").node;
    let body = [longs([file]), b"linked\0".to_vec()].concat();
    assert_eq!(guest.error(LINK, whole.node, &body), 0);
    assert_eq!(find(&mut guest, whole.node, "linked").node, file);
    assert!(share.volume().join("part/directory/back").exists() && share.volume().join("linked").exists());
}

#[test]
fn writable_mount_after_a_read_only_mount_makes_known_files_writable() {
    let mut share = Share::new();
    share.bind("", "0-rg.read");
    let mut guest = share.guest();
    let read = find_mount(&mut guest, "0-rg.read");
    let part = find(&mut guest, read.node, "part").node;
    let [file, directory] = ["file", "directory"].map(|name| find(&mut guest, part, name).node);
    let mkdir = [words([0o755, 0]), b"new\0".to_vec()].concat();
    assert_eq!(open_error(&mut guest, file, libc::O_RDWR), libc::EROFS);
    assert_eq!(guest.error(MKDIR, directory, &mkdir), libc::EROFS);
    let handle = guest.open(OPEN, file, libc::O_RDONLY);
    share.bind("", "1-wg.write");
    assert_eq!(find_mount(&mut guest, "1-wg.write"), read);
    // The guest has not looked these nodes up since the writable mount arrived.
    let writer = guest.open(OPEN, file, libc::O_RDWR);
    assert_eq!(write(&mut guest, file, writer, b"CONTENT"), 0);
    assert_eq!(guest.error(MKDIR, directory, &mkdir), 0);
    // The earlier handle stays read-only, and reads what was written.
    assert_eq!(write(&mut guest, file, handle, b"no"), libc::EBADF);
    let body = [longs([handle, 0]), words([64, 0, 0, 0, 0, 0])].concat();
    assert_eq!(guest.call(READ, file, &body, 64), (0, b"CONTENT".to_vec()));
    assert_eq!((release(&mut guest, file, handle), release(&mut guest, file, writer)), (0, 0));
    assert_eq!(release(&mut guest, file, writer), libc::EBADF);
}

#[test]
fn writable_part_of_a_read_only_whole_stays_writable_and_only_the_part() {
    for part_first in [true, false] {
        let mut share = Share::new();
        let names = [("part", "0-wg.part"), ("", "1-rg.whole")];
        let order = if part_first { [0, 1] } else { [1, 0] };
        share.bind(names[order[0]].0, names[order[0]].1);
        let mut guest = share.guest();
        find_mount(&mut guest, names[order[0]].1);
        fs::write(share.volume().join("outside"), "content").unwrap();
        if !part_first {
            let whole = find_mount(&mut guest, "1-rg.whole");
            find_path(&mut guest, whole.node, "part/directory/inner");
        }
        share.bind(names[order[1]].0, names[order[1]].1);
        find_mount(&mut guest, names[order[1]].1);
        let whole = find_mount(&mut guest, "1-rg.whole");
        let inner = find_path(&mut guest, whole.node, "part/directory/inner");
        let outside = find(&mut guest, whole.node, "outside").node;
        assert_eq!(open_error(&mut guest, inner, libc::O_RDWR), 0, "{part_first}");
        assert_eq!(open_error(&mut guest, outside, libc::O_RDWR), libc::EROFS);
        let mkdir = [words([0o755, 0]), b"new\0".to_vec()].concat();
        assert_eq!(guest.error(MKDIR, whole.node, &mkdir), libc::EROFS);
        let part = find_mount(&mut guest, "0-wg.part").node;
        assert_eq!(guest.error(MKDIR, part, &mkdir), 0);
        assert_eq!(rename(&mut guest, (part, "new"), (whole.node, "new")), libc::EXDEV);
    }
}

#[test]
fn files_of_a_part_stay_usable_when_the_whole_is_unmounted() {
    let mut share = Share::new();
    fs::write(share.volume().join("outside"), "content").unwrap();
    fs::write(share.volume().join("part/directory/later"), "content").unwrap();
    for (below, name) in [("part", "0-rg.reader"), ("part", "1-wg.part"), ("", "2-wg.whole")] {
        share.bind(below, name);
    }
    share.confined(|guest, unmount| {
        for name in ["0-rg.reader", "1-wg.part", "2-wg.whole"] {
            find_mount(guest, name);
        }
        let whole = find_mount(guest, "2-wg.whole").node;
        let (part, outside) = (find(guest, whole, "part").node, find(guest, whole, "outside").node);
        assert_eq!(part, find_mount(guest, "1-wg.part").node);
        let file = find(guest, part, "file").node;
        let directory = find(guest, part, "directory").node;
        let inner = find(guest, directory, "inner").node;
        let open = |guest: &mut Guest, node| open_error(guest, node, libc::O_RDWR);
        assert_eq!([file, inner, outside].map(|node| open(guest, node)), [0; 3]);
        unmount("2-wg.whole");
        assert_eq!([file, inner].map(|node| open(guest, node)), [0; 2]);
        assert_eq!(guest.error(OPENDIR, part, &words([0, 0])), 0);
        let later = find(guest, directory, "later").node;
        assert_eq!(open(guest, later), 0);
        assert_eq!(rename(guest, (directory, "later"), (part, "moved")), 0);
        // Only the whole has this file.
        assert_eq!(open(guest, outside), libc::EACCES);
        assert_eq!(rename(guest, (part, "moved"), (whole, "moved")), libc::EXDEV);
        // The files move to another mount that allows writes only if there is one.
        unmount("1-wg.part");
        assert_eq!(open(guest, file), libc::EROFS);
        assert_eq!(open_error(guest, file, libc::O_RDONLY), 0);
        unmount("0-rg.reader");
        assert_eq!(open_error(guest, file, libc::O_RDONLY), libc::EACCES);
    });
}

#[test]
fn directory_that_the_host_has_moved_out_of_a_mount_does_not_make_the_mount_unusable() {
    let mut share = Share::new();
    for name in ["0-rg.reader", "1-wg.part", "2-wg.other"] {
        share.bind("part", name);
    }
    let mut guest = share.guest();
    for name in ["0-rg.reader", "1-wg.part", "2-wg.other"] {
        find_mount(&mut guest, name);
    }
    let part = find_mount(&mut guest, "1-wg.part").node;
    let (file, directory) = (find(&mut guest, part, "file").node, find(&mut guest, part, "directory").node);
    fs::rename(share.volume().join("part/directory"), share.volume().join("moved")).unwrap();
    let outside = find(&mut guest, ROOT, ".volumes").node;
    assert_eq!(rename(&mut guest, (directory, "inner"), (outside, "inner")), libc::EXDEV);
    assert_eq!(open_error(&mut guest, file, libc::O_RDWR), 0);
}

#[test]
fn mounts_of_other_groups_are_not_joined() {
    let mut share = Share::new();
    for name in ["0-wg.1", "1-wh.1", "2.1", "3.1-wg"] {
        share.bind("part", name);
    }
    let mut guest = share.guest();
    let found = ["0-wg.1", "1-wh.1", "2.1", "3.1-wg"].map(|name| find_mount(&mut guest, name));
    assert!(found[0].group != 0 && found[1].group != 0 && found[0].group != found[1].group, "{found:?}");
    assert_eq!((found[2].group, found[3].group), (0, 0));
    let mut nodes: Vec<u64> = found.iter().map(|found| find(&mut guest, found.node, "file").node).collect();
    nodes.dedup();
    assert_eq!(nodes.len(), 4);
}

#[test]
fn guest_cannot_use_the_inner_node_of_a_file() {
    let mut share = Share::new();
    share.bind("part", PART);
    let mut guest = share.guest();
    let part = find_mount(&mut guest, PART);
    let file = find(&mut guest, part.node, "file").node;
    share.bind("", WHOLE);
    let whole = find_mount(&mut guest, WHOLE);
    assert_eq!(find_path(&mut guest, whole.node, "part/file"), file);
    let handle = guest.open(OPEN, file, libc::O_RDONLY);
    let known = [ROOT, part.node, whole.node, file, find(&mut guest, ROOT, ".volumes").node];
    for node in (0..40).filter(|node| !known.contains(node)) {
        forget(&mut guest, node, u64::MAX);
        assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), libc::EBADF, "{node}");
        let body = [longs([handle, 0]), words([64, 0, 0, 0, 0, 0])].concat();
        assert_eq!(guest.error(READ, node, &body), libc::EBADF, "{node}");
    }
    let body = [longs([handle, 0]), words([64, 0, 0, 0, 0, 0])].concat();
    assert_eq!(guest.call(READ, file, &body, 64), (0, b"content".to_vec()));
    assert_eq!(guest.error(GETATTR, file, &longs([0, 0])), 0);
}

#[test]
fn forget_closes_all_files_of_joined_mounts() {
    let mut share = Share::new();
    share.bind("part", PART);
    let mut guest = share.guest();
    let before = share.open_files();
    let mut counts = std::collections::BTreeMap::<u64, u64>::new();
    let mut look_up = |guest: &mut Guest, from: u64, path: &str| {
        path.split('/').fold(from, |node, name| {
            let found = find(guest, node, name).node;
            *counts.entry(found).or_default() += 1;
            found
        })
    };
    let part = look_up(&mut guest, ROOT, &format!(".volumes/{PART}"));
    for path in ["file", "file", "fifo", "directory/inner"] {
        look_up(&mut guest, part, path);
    }
    share.bind("", WHOLE);
    let whole = look_up(&mut guest, ROOT, &format!(".volumes/{WHOLE}"));
    for _ in 0..2 {
        look_up(&mut guest, ROOT, &format!(".volumes/{PART}"));
        for path in ["file", "fifo", "directory/inner", "directory"] {
            look_up(&mut guest, whole, &format!("part/{path}"));
            look_up(&mut guest, part, path);
        }
    }
    // One fd for each of: `.volumes`, the two roots, the directory and the three files in the part. The root of the part
    // and the directory have moved, and keep their earlier fds.
    assert_eq!(share.open_files() - before, 9);
    for (&node, &count) in &counts {
        forget(&mut guest, node, count - 1);
        assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), 0, "{node}");
    }
    counts.keys().for_each(|&node| forget(&mut guest, node, 1));
    assert_eq!(share.open_files(), before);
    // The join begins again.
    let whole = find_mount(&mut guest, WHOLE);
    let file = find_path(&mut guest, whole.node, "part/file");
    let part = find_mount(&mut guest, PART);
    assert_eq!((find(&mut guest, part.node, "file").node, part.group), (file, whole.group));
}

#[test]
fn open_files_and_locks_stay_when_a_node_moves() {
    let mut share = Share::new();
    share.bind("part", PART);
    let mut guest = share.guest();
    let part = find_mount(&mut guest, PART);
    let file = find(&mut guest, part.node, "file").node;
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    // `struct fuse_lk_in`: handle, owner, start, end, type, pid, flags.
    let lock = |handle: u64, owner: u64| {
        [longs([handle, owner, 0, i64::MAX as u64]), words([libc::F_WRLCK as u32, 7, 0, 0])].concat()
    };
    assert_eq!(guest.error(SETLK, file, &lock(handle, 1)), 0);
    share.bind("", WHOLE);
    let whole = find_mount(&mut guest, WHOLE);
    assert_eq!(find_path(&mut guest, whole.node, "part/file"), file);
    let other = guest.open(OPEN, file, libc::O_RDWR);
    assert_eq!(guest.error(SETLK, file, &lock(other, 2)), libc::EAGAIN);
    assert_eq!(write(&mut guest, file, handle, b"CONT"), 0);
    // ftruncate(2) with the handle of the earlier inner node: FATTR_SIZE and FATTR_FH.
    let mut truncate = [words([1 << 3 | 1 << 6, 0]), longs([handle, 4])].concat();
    truncate.resize(88, 0);
    assert_eq!(guest.error(SETATTR, file, &truncate), 0);
    assert_eq!(fs::read(share.volume().join("part/file")).unwrap(), b"CONT");
    assert_eq!(release(&mut guest, file, handle), 0);
    assert_eq!(guest.error(SETLK, file, &lock(other, 2)), 0);
    assert_eq!(release(&mut guest, file, other), 0);
    fs::File::options().write(true).open(share.volume().join("part/file")).unwrap().write_all_at(b"x", 0).unwrap();
}
