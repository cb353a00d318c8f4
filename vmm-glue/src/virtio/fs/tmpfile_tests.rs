//! Tests of files that a guest creates without a name (O_TMPFILE), and links later.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use husk_base::sys::xattr;
use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::names_tests::{guest_of, requests};
use super::requests_tests::{with_handle, without_handle};
use super::test_guest::*;
use super::test_tree::Tree;
use crate::jail::{Belongings, restrict};

/// The flags of open(2) with which most tests create a file.
const FLAGS: i32 = libc::O_TMPFILE | libc::O_RDWR;
/// First number of the nodes and handles of temporary files.
const FIRST: u64 = 1 << 63;
/// Offsets of fields in the answer to TMPFILE: `attr` of `struct fuse_entry_out`, and `struct fuse_open_out`.
const ATTR: usize = 40;
const OPENED: usize = 128;

fn tmpfile_body(flags: i32, mode: u32, umask: u32) -> Vec<u8> {
    [&words([flags.cast_unsigned(), mode, umask, 0])[..], b"/\0"].concat()
}

/// Creates files without a name until this fails. Returns their nodes and handles, and the errno.
fn create_all(guest: &mut Guest) -> (Vec<(u64, u64)>, i32) {
    let mut files = Vec::new();
    loop {
        match guest.call(TMPFILE, ROOT, &tmpfile_body(FLAGS, 0o600, 0), OPENED + 16) {
            (0, answer) => files.push((u64_at(&answer, 0), u64_at(&answer, OPENED))),
            (error, _) => return (files, -error),
        }
    }
}

/// Creates a guest whose share may have 512 files open, and 64 of them for files without a name.
fn guest_with_few_fds(tree: &Tree) -> Guest {
    let mut guest = Guest::with_belongings(&tree.share(), 1, Belongings { max_fds: 1024, ..belongings() });
    guest.init();
    guest
}

/// Creates a file, or opens the file that has the name. Returns the errno, the node and the handle.
fn create_named(guest: &mut Guest, directory: u64, name: &str, flags: i32) -> (i32, u64, u64) {
    let flags = (libc::O_CREAT | flags).cast_unsigned();
    let body = [&words([flags, 0o644, 0, 0])[..], format!("{name}\0").as_bytes()].concat();
    match guest.call(CREATE, directory, &body, OPENED + 16) {
        (0, answer) => (0, u64_at(&answer, 0), u64_at(&answer, OPENED)),
        (error, _) => (-error, 0, 0),
    }
}

/// Creates a file without a name. Returns its node and its handle.
fn create(guest: &mut Guest, directory: u64, flags: i32) -> (u64, u64) {
    let (error, answer) = guest.call(TMPFILE, directory, &tmpfile_body(flags, 0o600, 0), OPENED + 16);
    assert_eq!(error, 0);
    (u64_at(&answer, 0), u64_at(&answer, OPENED))
}

fn write(guest: &mut Guest, node: u64, handle: u64, offset: u64, data: &[u8]) -> i32 {
    let body = [longs([handle, offset]), words([data.len() as u32, 0, 0, 0, 0, 0]), data.to_vec()].concat();
    guest.error(WRITE, node, &body)
}

fn read(guest: &mut Guest, node: u64, handle: u64) -> Vec<u8> {
    let (error, data) = guest.call(READ, node, &[longs([handle, 0]), words([64, 0, 0, 0, 0, 0])].concat(), 64);
    assert_eq!(error, 0);
    data
}

/// Links a node. Returns the errno, and the node of the answer.
fn link(guest: &mut Guest, node: u64, directory: u64, name: &str) -> (i32, u64) {
    let body = [longs([node]), format!("{name}\0").into_bytes()].concat();
    let (error, answer) = guest.call(LINK, directory, &body, 128);
    (-error, if error == 0 { u64_at(&answer, 0) } else { 0 })
}

/// Returns the number of links of a node.
fn links(guest: &mut Guest, node: u64) -> u32 {
    let (error, answer) = guest.call(GETATTR, node, &longs([0, 0]), 104);
    assert_eq!(error, 0);
    u32::from_le_bytes(answer[80..84].try_into().unwrap())
}

fn unlink(guest: &mut Guest, directory: u64, name: &str) {
    assert_eq!(guest.error(UNLINK, directory, format!("{name}\0").as_bytes()), 0);
}

fn release(guest: &mut Guest, node: u64, handle: u64) {
    assert_eq!(guest.error(RELEASE, node, &longs([handle, 0, 0])), 0);
}

/// Drops references of a node, and waits until the device has dropped them.
fn forget(guest: &mut Guest, node: u64, count: u64) {
    let header = guest.header(FORGET, node, 8);
    guest.bench.queues[1].add(&[&header, &count.to_le_bytes()], &[]);
    guest.bench.run_until(|queues| queues[1].poll().is_some());
}

/// Returns the paths of the files below `top` that this process has open and that have no name.
fn open_without_name(top: &Path) -> Vec<PathBuf> {
    let is_unnamed = |path: &PathBuf| path.starts_with(top) && path.to_string_lossy().ends_with(" (deleted)");
    // Other tests close their files meanwhile.
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter(is_unnamed)
        .collect()
}

#[test]
fn file_without_a_name_gets_its_name_and_content_by_a_later_link() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let before = tree.state();
    let directory = guest.lookup(ROOT, "dir");
    let (node, handle) = create(&mut guest, directory, FLAGS);
    assert_eq!(write(&mut guest, node, handle, 0, b"before"), 0);
    for datasync in [0, 1] {
        assert_eq!(guest.error(FSYNC, node, &longs([handle, datasync])), 0);
    }
    assert_eq!(links(&mut guest, node), 0);
    assert_eq!(tree.state(), before);
    // The file keeps its node, and virtiofsd's node for the new name is not seen.
    assert_eq!(link(&mut guest, node, directory, "linked"), (0, node));
    assert_eq!(guest.lookup(directory, "linked"), node);
    let path = tree.share().join("dir/linked");
    assert_eq!(fs::read(&path).unwrap(), b"before");
    assert_eq!(write(&mut guest, node, handle, 6, b" and after"), 0);
    assert_eq!(fs::read(&path).unwrap(), b"before and after");
    fs::write(&path, "of the host").unwrap();
    let again = guest.open(OPEN, node, libc::O_RDONLY);
    for handle in [again, handle] {
        assert_eq!(read(&mut guest, node, handle), b"of the host");
    }
    assert_eq!(link(&mut guest, node, ROOT, "twice"), (0, node));
    assert_eq!((links(&mut guest, node), guest.lookup(ROOT, "twice")), (2, node));
    assert_eq!(link(&mut guest, node, ROOT, "twice").0, libc::EEXIST);
    unlink(&mut guest, ROOT, "twice");
    unlink(&mut guest, directory, "linked");
    // Linux links a file that has lost its last name not again.
    assert_eq!(link(&mut guest, node, ROOT, "third").0, libc::ENOENT);
}

#[test]
fn forgotten_file_is_found_by_its_name() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    assert_eq!(write(&mut guest, node, handle, 0, b"content"), 0);
    assert_eq!(link(&mut guest, node, ROOT, "linked"), (0, node));
    assert_eq!(guest.lookup(ROOT, "linked"), node);
    release(&mut guest, node, handle);
    // The guest got the node three times.
    forget(&mut guest, node, 2);
    assert_eq!(guest.lookup(ROOT, "linked"), node);
    forget(&mut guest, node, 2);
    assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), libc::EBADF);
    let named = guest.lookup(ROOT, "linked");
    assert!(named < FIRST);
    let handle = guest.open(OPEN, named, libc::O_RDONLY);
    assert_eq!(read(&mut guest, named, handle), b"content");
}

#[test]
fn create_with_the_name_of_a_linked_file_opens_its_own_node() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    assert_eq!(write(&mut guest, node, handle, 0, b"content"), 0);
    assert_eq!(link(&mut guest, node, ROOT, "linked"), (0, node));
    assert_eq!(create_named(&mut guest, ROOT, "linked", libc::O_RDWR | libc::O_EXCL).0, libc::EEXIST);
    let (error, opened, again) = create_named(&mut guest, ROOT, "linked", libc::O_RDWR);
    assert_eq!((error, opened), (0, node));
    assert_eq!(read(&mut guest, node, again), b"content");
    let (error, opened, emptied) = create_named(&mut guest, ROOT, "linked", libc::O_RDWR | libc::O_TRUNC);
    assert_eq!((error, opened), (0, node));
    for handle in [handle, again, emptied] {
        assert_eq!(read(&mut guest, node, handle), b"");
        release(&mut guest, node, handle);
    }
    // The guest got the node four times.
    forget(&mut guest, node, 3);
    assert_eq!(links(&mut guest, node), 1);
    forget(&mut guest, node, 1);
    assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), libc::EBADF);
}

#[test]
fn create_that_fails_for_lack_of_fds_counts_no_reference() {
    let tree = Tree::new();
    let mut guest = guest_with_few_fds(&tree);
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    assert_eq!(link(&mut guest, node, ROOT, "linked"), (0, node));
    create_all(&mut guest);
    assert_eq!(create_named(&mut guest, ROOT, "linked", libc::O_RDWR).0, libc::ENFILE);
    release(&mut guest, node, handle);
    // The guest got the node from TMPFILE and LINK.
    forget(&mut guest, node, 2);
    assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), libc::EBADF);
}

#[test]
fn directory_listing_has_the_own_node_of_a_linked_file() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let directory = guest.lookup(ROOT, "dir");
    let (node, _) = create(&mut guest, directory, FLAGS);
    assert_eq!(link(&mut guest, node, directory, "linked"), (0, node));
    let open = guest.open(OPENDIR, directory, libc::O_RDONLY);
    let body = [longs([open, 0]), words([4096, 0, 0, 0, 0, 0])].concat();
    let (error, mut entries) = guest.call(READDIRPLUS, directory, &body, 4096 + 16);
    assert_eq!(error, 0);
    let mut nodes = Vec::new();
    while !entries.is_empty() {
        // `struct fuse_entry_out`, `struct fuse_dirent` and the name, which is padded to a multiple of 8 bytes.
        let length = u32::from_le_bytes(entries[144..148].try_into().unwrap()) as usize;
        if entries[152..152 + length] == *b"linked" {
            nodes.push(u64_at(&entries, 0));
        }
        entries.drain(..(152 + length).next_multiple_of(8));
    }
    assert_eq!(nodes, [node]);
    // The guest got the node three times.
    forget(&mut guest, node, 2);
    assert_eq!(links(&mut guest, node), 1);
    forget(&mut guest, node, 1);
    assert_eq!(guest.error(GETATTR, node, &longs([0, 0])), libc::EBADF);
}

#[test]
fn file_that_is_never_linked_leaves_nothing() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let before = tree.state();
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    let again = guest.open(OPEN, node, libc::O_RDWR);
    assert_eq!(write(&mut guest, node, again, 0, b"temporary"), 0);
    assert_eq!(read(&mut guest, node, handle), b"temporary");
    assert_eq!(open_without_name(&tree.top()).len(), 3);
    release(&mut guest, node, handle);
    release(&mut guest, node, again);
    forget(&mut guest, node, 1);
    assert_eq!((open_without_name(&tree.top()), tree.state()), (Vec::new(), before));
    assert_eq!(link(&mut guest, node, ROOT, "late").0, libc::EBADF);
}

#[test]
fn file_that_was_created_exclusively_cannot_be_linked() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, _) = create(&mut guest, ROOT, FLAGS | libc::O_EXCL);
    assert_eq!(link(&mut guest, node, ROOT, "exclusive").0, libc::ENOENT);
    assert!(!tree.share().join("exclusive").exists());
}

#[test]
fn link_to_another_mount_fails() {
    let tree = Tree::new();
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("failed to create a mount namespace: this test needs root");
        let (none, point) = (None::<&str>, tree.share().join("hollow"));
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        mount(Some("tmpfs"), &point, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let mut guest = guest_of(&tree);
        let other = guest.lookup(ROOT, "hollow");
        let (node, _) = create(&mut guest, ROOT, FLAGS);
        assert_eq!(link(&mut guest, node, other, "linked").0, libc::EXDEV);
        let (node, _) = create(&mut guest, other, FLAGS);
        assert_eq!(link(&mut guest, node, ROOT, "linked").0, libc::EXDEV);
        assert_eq!(link(&mut guest, node, other, "linked"), (0, node));
        drop(guest);
        umount2(&point, MntFlags::MNT_DETACH).unwrap();
    });
    thread.join().unwrap();
}

#[test]
fn file_belongs_to_the_user_and_has_the_mode_of_the_request() {
    let tree = Tree::new();
    let directory = tree.share().join("dir");
    std::os::unix::fs::chown(&directory, None, Some(77)).unwrap();
    let mut guest = guest_of(&tree);
    let parent = guest.lookup(ROOT, "dir");
    for (setgid, group) in [(0, 1001), (0o2000, 77)] {
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777 | setgid)).unwrap();
        let body = tmpfile_body(FLAGS, 0o666, 0o027);
        let mut header = guest.header(TMPFILE, parent, body.len());
        header[24..32].copy_from_slice(&words([1000, 1001]));
        guest.bench.queues[1].add(&[&header, &body], &[16, 256]);
        let mut answer = None;
        guest.bench.run_until(|queues| {
            answer = queues[1].poll();
            answer.is_some()
        });
        let (_, answer) = answer.unwrap();
        assert_eq!(answer[4..8], [0; 4], "TMPFILE failed");
        let attr = &answer[16 + ATTR..];
        let field = |at: usize| u32::from_le_bytes(attr[at..at + 4].try_into().unwrap());
        assert_eq!((field(60), field(64), field(68), field(72)), (libc::S_IFREG | 0o640, 0, 1000, group));
        let name = format!("linked{group}");
        assert_eq!(link(&mut guest, u64_at(&answer, 16), parent, &name).0, 0);
        let meta = fs::metadata(directory.join(name)).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 1000, group));
    }
}

#[test]
fn attributes_are_kept_by_the_link() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, _) = create(&mut guest, ROOT, FLAGS);
    let set = |name: &str| [&words([3, 0, 0, 0])[..], format!("{name}\0abc").as_bytes()].concat();
    for name in ["user.a", "trusted.overlay.opaque"] {
        assert_eq!(guest.error(SETXATTR, node, &set(name)), 0);
        let get = [&words([64, 0])[..], format!("{name}\0").as_bytes()].concat();
        assert_eq!(guest.call(GETXATTR, node, &get, 64), (0, b"abc".to_vec()));
    }
    assert_eq!(guest.error(SETXATTR, node, &set("user.husk.trusted.a")), libc::EPERM);
    let (error, names) = guest.call(LISTXATTR, node, &words([64, 0]), 64);
    let mut names: Vec<&[u8]> = names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!((error, names), (0, vec![&b"trusted.overlay.opaque"[..], b"user.a"]));
    assert_eq!(guest.error(REMOVEXATTR, node, b"user.a\0"), 0);
    // `struct fuse_setattr_in`: the mode, the owner, the size and the modification time.
    let valid = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;
    let body = [words([valid, 0]), longs([0, 4096, 0, 0, 99, 0]), words([0, 5, 0, 0o751, 0, 12, 34, 0])].concat();
    assert_eq!(guest.error(SETATTR, node, &body), 0);
    assert_eq!(link(&mut guest, node, ROOT, "linked").0, 0);
    let path = tree.share().join("linked");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.len()), (0o751, 12, 34, 4096));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (99, 5));
    let names = xattr::list(&path).unwrap();
    assert_eq!(names, b"user.husk.trusted.overlay.opaque\0");
}

#[test]
fn requests_have_the_same_results_as_for_a_file_with_a_name() {
    let results = |named: bool| {
        let tree = Tree::new();
        let mut guest = guest_of(&tree);
        let (node, handle) = if named {
            let node = guest.lookup(ROOT, "hello");
            (node, guest.open(OPEN, node, libc::O_RDWR))
        } else {
            create(&mut guest, ROOT, FLAGS)
        };
        let (other, empty) = (guest.lookup(ROOT, "file"), create(&mut guest, ROOT, FLAGS));
        let mut results = Vec::new();
        for (label, opcode, body) in without_handle().into_iter().chain(with_handle(handle, node)) {
            // virtiofsd has no node for requests that are only for other types of files.
            if !matches!(opcode, OPENDIR | TMPFILE | SYNCFS | READDIR | READDIRPLUS | FSYNCDIR | RELEASEDIR) {
                results.push((label, guest.error(opcode, node, &body)));
            }
        }
        let handle = guest.open(OPEN, node, libc::O_RDWR);
        assert_eq!(write(&mut guest, node, handle, 0, b"copied"), 0);
        for (target, target_handle) in [empty, (other, guest.open(OPEN, other, libc::O_RDWR))] {
            let body = longs([handle, 0, target, target_handle, 0, 6, 0]);
            results.push(("COPY_FILE_RANGE".into(), guest.error(COPY_FILE_RANGE, node, &body)));
            assert_eq!(read(&mut guest, target, target_handle)[..6], *b"copied");
        }
        results
    };
    assert_eq!(results(false), results(true));
}

/// The guest's kernel builds the answer to FIEMAP from these requests (guest/kernel/patches).
#[test]
fn seek_finds_the_ranges_of_data_with_and_without_a_name() {
    let tree = Tree::new();
    let file = File::options().write(true).open(tree.share().join("file")).unwrap();
    file.set_len(4 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 1 << 20).unwrap();
    let mut guest = guest_of(&tree);
    let named = guest.lookup(ROOT, "file");
    let named = (named, guest.open(OPEN, named, libc::O_RDONLY));
    let unnamed = create(&mut guest, ROOT, FLAGS);
    for (offset, data) in [(0, &b"content"[..]), (1 << 20, b"data"), ((4 << 20) - 1, b"x")] {
        assert_eq!(write(&mut guest, unnamed.0, unnamed.1, offset, data), 0);
    }
    for ((node, handle), size) in [(named, 2), (unnamed, 3)] {
        let mut seek = |offset: u64, whence: i32| {
            let body = [longs([handle, offset]), words([whence.cast_unsigned(), 0])].concat();
            match guest.call(LSEEK, node, &body, 8) {
                (0, answer) => Ok(u64_at(&answer, 0)),
                (error, _) => Err(-error),
            }
        };
        let (mut ranges, mut at) = (Vec::new(), 0);
        let end = loop {
            match seek(at, libc::SEEK_DATA) {
                Ok(data) => {
                    at = seek(data, libc::SEEK_HOLE).unwrap();
                    ranges.push((data, at));
                }
                Err(error) => break error,
            }
        };
        let all = [(0, 4096), (1 << 20, (1 << 20) + 4096), ((4 << 20) - 4096, 4 << 20)];
        assert_eq!((end, &ranges[..]), (libc::ENXIO, &all[..size]));
        assert_eq!(seek(0, 9), Err(libc::EINVAL));
    }
}

#[test]
fn lock_of_a_file_without_a_name_applies_to_the_host_after_the_link() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    let lock = [longs([handle, 5, 0, i64::MAX.cast_unsigned()]), words([libc::F_WRLCK as u32, 7, 0, 0])].concat();
    assert_eq!(guest.error(SETLK, node, &lock), 0);
    assert_eq!(link(&mut guest, node, ROOT, "linked").0, 0);
    let file = File::options().read(true).write(true).open(tree.share().join("linked")).unwrap();
    let held = || {
        let mut lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
        lock.l_type != libc::F_UNLCK as i16
    };
    assert!(held());
    assert_eq!(guest.error(FLUSH, node, &longs([handle, 0, 5])), 0);
    assert!(!held());
}

#[test]
fn destroy_and_init_close_files_without_a_name() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    for opcode in [DESTROY, INIT] {
        let (node, handle) = create(&mut guest, ROOT, FLAGS);
        let (linked, _) = create(&mut guest, ROOT, FLAGS);
        assert_eq!(link(&mut guest, linked, ROOT, &format!("linked{opcode}")), (0, linked));
        if opcode == DESTROY {
            let header = guest.header(DESTROY, ROOT, 0);
            guest.bench.queues[1].add(&[&header], &[]);
            guest.bench.run_until(|queues| queues[1].poll().is_some());
            assert_eq!(open_without_name(&tree.top()), Vec::<PathBuf>::new());
        }
        guest.init();
        assert_eq!(open_without_name(&tree.top()), Vec::<PathBuf>::new());
        for (label, opcode, body) in without_handle().into_iter().chain(with_handle(handle, node)) {
            assert_eq!(guest.error(opcode, node, &body), libc::EBADF, "{label} for a stale node must return EBADF");
        }
        let named = guest.lookup(ROOT, &format!("linked{opcode}"));
        assert!(named < FIRST);
    }
}

#[test]
fn hostile_numbers_are_rejected() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, handle) = create(&mut guest, ROOT, FLAGS);
    let (other, other_handle) = create(&mut guest, ROOT, FLAGS);
    let file = guest.lookup(ROOT, "file");
    let file_handle = guest.open(OPEN, file, libc::O_RDWR);
    let before = tree.state();
    for unknown in [other_handle + 1, handle, FIRST | 1 << 32, u64::MAX] {
        let named = requests(unknown, unknown, b"file\0").into_iter().chain(requests(ROOT, unknown, b"new\0"));
        for (label, opcode, body) in named.chain(without_handle()).chain(with_handle(handle, unknown)) {
            let error = guest.error(opcode, unknown, &body);
            assert_eq!(error, libc::EBADF, "{label} for unknown node {unknown:#x} must return EBADF");
        }
    }
    let pairs =
        [(other, handle), (node, other_handle), (node, file_handle), (file, handle), (node, u64::MAX), (node, 0)];
    for (node, handle) in pairs {
        for (label, opcode, body) in with_handle(handle, node) {
            let error = guest.error(opcode, node, &body);
            assert_eq!(error, libc::EBADF, "{label} with the handle of another node must return EBADF");
        }
    }
    // A file without a name is no directory.
    for (label, opcode, body) in requests(node, file, b"new\0") {
        assert_eq!(guest.error(opcode, node, &body), libc::EBADF, "{label} in a file must return EBADF");
    }
    assert_eq!(link(&mut guest, node, other, "new").0, libc::EBADF);
    for name in HOSTILE_NAMES {
        assert_eq!(link(&mut guest, node, ROOT, name).0, libc::EINVAL);
    }
    assert_eq!(tree.state(), before);
    // A request that is too short, and an answer that does not fit.
    assert_eq!(guest.error(TMPFILE, ROOT, &[0; 15]), libc::EINVAL);
    assert_eq!(-guest.call(TMPFILE, ROOT, &tmpfile_body(FLAGS, 0, 0), 143).0, libc::EINVAL);
    for flags in [0, libc::O_EXCL] {
        assert_eq!(guest.error(TMPFILE, ROOT, &tmpfile_body(flags, 0o644, 0)), libc::EINVAL);
    }
    let set_mode = tmpfile_body(libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_PATH, u32::MAX, 0);
    let (error, answer) = guest.call(TMPFILE, ROOT, &set_mode, OPENED + 16);
    assert_eq!((error, u32::from_le_bytes(answer[100..104].try_into().unwrap())), (0, libc::S_IFREG | 0o7777));
    assert_eq!(tree.state(), before);
}

#[test]
fn number_of_files_without_a_name_is_limited() {
    let tree = Tree::new();
    let mut guest = guest_with_few_fds(&tree);
    let (files, error) = create_all(&mut guest);
    assert_eq!((error, files.len()), (libc::ENFILE, 32));
    assert_eq!(guest.error(OPEN, files[0].0, &words([0, 0])), libc::ENFILE);
    for (node, handle) in files {
        release(&mut guest, node, handle);
        forget(&mut guest, node, 1);
    }
    create(&mut guest, ROOT, FLAGS);
}

#[test]
fn landlock_rules_allow_files_without_a_name() {
    let tree = Tree::new();
    let thread = thread::spawn(move || {
        let belongings = belongings();
        restrict(Some(&tree.share()), false).unwrap();
        let mut guest = Guest::with_belongings(&tree.share(), 1, belongings);
        guest.init();
        let directory = guest.lookup(ROOT, "dir");
        let (node, handle) = create(&mut guest, ROOT, FLAGS);
        assert_eq!(write(&mut guest, node, handle, 0, b"content"), 0);
        assert_eq!(link(&mut guest, node, directory, "linked"), (0, node));
        let again = guest.open(OPEN, node, libc::O_RDWR);
        assert_eq!(read(&mut guest, node, again), b"content");
    });
    thread.join().unwrap();
}
