//! Tests what the guest may cache of the files of each kind of mount.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::test_guest::*;

/// Flag of an open file for which the guest sends FLUSH only because of locks (include/uapi/linux/fuse.h).
const NOFLUSH: u32 = 1 << 5;
/// Flag of an open file that nobody outside the guest uses (guest/kernel/patches).
const PRIVATE: u32 = 1 << 31;
/// A time that Linux treats as unlimited, in ms.
const UNLIMITED: u64 = 10 * 365 * 24 * 3600 * 1000;

const ROOTFS: &str = "pod/rootfs";
const EMPTY_DIR: &str = ".volumes/0.fd-1-2-3-local-private";
const LOCAL: &str = ".volumes/1.fd-1-3-3-local";
const REMOTE: &str = ".volumes/2.fd-1-4-3";

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Returns a time of an answer in ms.
fn time(bytes: &[u8], seconds: usize, nanoseconds: usize) -> u64 {
    u64_at(bytes, seconds) * 1000 + u64::from(u32_at(bytes, nanoseconds)) / 1_000_000
}

/// Returns a guest, and its node of the directory of each mount.
fn guest(root: &Path) -> (Guest, [u64; 4]) {
    for mount in [ROOTFS, EMPTY_DIR, LOCAL, REMOTE] {
        fs::create_dir_all(root.join(mount)).unwrap();
        fs::write(root.join(mount).join("file"), b"content").unwrap();
    }
    let mut guest = Guest::with_share(root, 1);
    guest.init();
    let nodes = [ROOTFS, EMPTY_DIR, LOCAL, REMOTE]
        .map(|mount| mount.split('/').fold(ROOT, |node, name| guest.lookup(node, name)));
    (guest, nodes)
}

#[test]
fn answers_say_how_long_the_guest_caches_names_and_attributes() {
    let root = tempfile::tempdir().unwrap();
    let (mut guest, nodes) = guest(root.path());
    for (directory, of_file, of_directory, of_missing) in [
        (nodes[0], UNLIMITED, UNLIMITED, Some(UNLIMITED)),
        (nodes[1], 10_000, 1000, Some(1000)),
        (nodes[2], 1000, 1000, None),
        (nodes[3], 1000, 1000, None),
    ] {
        let (error, entry) = guest.call(LOOKUP, directory, b"file\0", 128);
        assert_eq!((error, time(&entry, 16, 32), time(&entry, 24, 36)), (0, of_file, of_file));
        let file = u64_at(&entry, 0);
        for (node, expected) in [(file, of_file), (directory, of_directory)] {
            let (error, attributes) = guest.call(GETATTR, node, &[0; 16], 104);
            assert_eq!((error, time(&attributes, 0, 8)), (0, expected));
        }
        let body = [words([0o755, 0]), b"made\0".to_vec()].concat();
        let (error, entry) = guest.call(MKDIR, directory, &body, 128);
        assert_eq!((error, time(&entry, 16, 32), time(&entry, 24, 36)), (0, of_directory, of_directory));
        let (error, missing) = guest.call(LOOKUP, directory, b"missing\0", 128);
        let expected = of_missing.map_or((-libc::ENOENT, None), |timeout| (0, Some((0, timeout))));
        let found = (!missing.is_empty()).then(|| (u64_at(&missing, 0), time(&missing, 16, 32)));
        assert_eq!((error, found), expected);
    }
    // The shim makes and removes the mounts.
    let volumes = guest.lookup(ROOT, ".volumes");
    let (_, entry) = guest.call(LOOKUP, volumes, b"0.fd-1-2-3-local-private\0", 128);
    assert_eq!(time(&entry, 16, 32), 1000);
    assert_eq!(guest.error(LOOKUP, volumes, b"9.fd-1-2-3-local-private\0"), libc::ENOENT);
}

#[test]
fn options_of_open_files_depend_on_the_mount() {
    let root = tempfile::tempdir().unwrap();
    let (mut guest, nodes) = guest(root.path());
    let expected = [PRIVATE | NOFLUSH, PRIVATE | NOFLUSH, NOFLUSH, 0];
    for (directory, expected) in nodes.into_iter().zip(expected) {
        let node = guest.lookup(directory, "file");
        let (error, opened) = guest.call(OPEN, node, &words([libc::O_RDWR as u32, 0]), 16);
        assert_eq!((error, u32_at(&opened, 8) & (PRIVATE | NOFLUSH)), (0, expected));
        let create = [words([libc::O_RDWR as u32, 0o644, 0, 0]), b"new\0".to_vec()].concat();
        let (error, created) = guest.call(CREATE, directory, &create, 144);
        assert_eq!((error, u32_at(&created, 128 + 8) & (PRIVATE | NOFLUSH)), (0, expected));
    }
}

#[test]
fn answer_to_a_write_has_the_attributes_if_they_are_cheap_and_fit() {
    let root = tempfile::tempdir().unwrap();
    let (mut guest, nodes) = guest(root.path());
    for (mount, directory, cheap) in
        [(ROOTFS, nodes[0], true), (EMPTY_DIR, nodes[1], true), (LOCAL, nodes[2], true), (REMOTE, nodes[3], false)]
    {
        let path = root.path().join(mount).join("file");
        let node = guest.lookup(directory, "file");
        let handle = guest.open(OPEN, node, libc::O_RDWR);
        let mut write = |offset: u64, answer_size: usize| {
            let body = [longs([handle, offset]), words([4, 0, 0, 0, 0, 0]), b"data".to_vec()].concat();
            let (error, answer) = guest.call(WRITE, node, &body, answer_size);
            assert_eq!((error, u32_at(&answer, 0)), (0, 4));
            answer[8..].to_vec()
        };
        assert!(write(7, 8).is_empty() && write(7, 127).is_empty());
        let before = fs::metadata(&path).unwrap();
        let attributes = write(11, 128);
        if !cheap {
            assert!(attributes.is_empty());
            continue;
        }
        let after = fs::metadata(&path).unwrap();
        assert_eq!(attributes.len(), 120);
        assert_eq!([16, 24].map(|at| u64_at(&attributes, at)), [after.ino(), 15]);
        let mtime =
            |seconds, nanoseconds| (u64_at(&attributes, seconds) as i64, i64::from(u32_at(&attributes, nanoseconds)));
        assert_eq!(mtime(48, 68), (after.mtime(), after.mtime_nsec()));
        assert_eq!(mtime(104, 112), (before.mtime(), before.mtime_nsec()));
    }
}
