//! Tests of FUSE requests that no guest kernel sends. No request may follow a symlink, open a special file, or use
//! another node's handle.

use super::names_tests::{Request, guest_of, requests};
use super::test_guest::*;
use super::test_tree::{Tree, differences};

/// FUSE_SECURITY_CTX: bit 32 of the INIT flags, and therefore bit 0 of `flags2`.
const SECURITY_CTX: u32 = 1 << 0;
/// The smallest flags of open(2) for a file without a name.
const TMPFILE_FLAGS: i32 = libc::O_TMPFILE | libc::O_RDWR;
const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_FH: u32 = 1 << 6;

/// Encodes `struct fuse_setattr_in`.
fn setattr(valid: u32, handle: u64) -> Vec<u8> {
    [words([valid, 0]), longs([handle, 3, 0, 1, 1, 1]), words([1, 1, 1, 0o777, 0, 12, 34, 0])].concat()
}

fn flags(flags: i32) -> Vec<u8> {
    words([flags.cast_unsigned(), 0])
}

fn create(flags: i32, name: &str) -> Vec<u8> {
    [words([flags.cast_unsigned(), 0o644, 0, 0]), format!("{name}\0").into_bytes()].concat()
}

/// Returns one request for each operation that takes a handle. The COPY_FILE_RANGE request copies to the node `other`.
pub fn with_handle(handle: u64, other: u64) -> Vec<Request> {
    let read = || [longs([handle, 0]), words([128, 0, 0, 0, 0, 0])].concat();
    [
        ("READ", READ, read()),
        ("WRITE", WRITE, [longs([handle, 0]), words([3, 0, 0, 0, 0, 0]), b"bad".to_vec()].concat()),
        ("READDIR", READDIR, read()),
        ("READDIRPLUS", READDIRPLUS, read()),
        ("FLUSH", FLUSH, longs([handle, 0, 0])),
        ("FSYNC", FSYNC, longs([handle, 0])),
        ("FSYNCDIR", FSYNCDIR, longs([handle, 0])),
        ("FALLOCATE", FALLOCATE, longs([handle, 0, 100, 0])),
        ("LSEEK", LSEEK, longs([handle, 0, 0])),
        ("COPY_FILE_RANGE", COPY_FILE_RANGE, longs([handle, 0, other, handle, 0, 3, 0])),
        ("SETATTR", SETATTR, setattr(FATTR_FH | FATTR_SIZE | FATTR_MODE | FATTR_MTIME, handle)),
        ("RELEASE", RELEASE, longs([handle, 0, 0])),
        ("RELEASEDIR", RELEASEDIR, longs([handle, 0, 0])),
    ]
    .map(|(label, opcode, body)| (label.to_owned(), opcode, body))
    .into()
}

/// Returns requests for the operations that take neither the name of a directory entry nor a handle.
pub fn without_handle() -> Vec<Request> {
    let xattr = b"user.a\0";
    [
        ("GETATTR", GETATTR, longs([0, 0])),
        ("SETATTR", SETATTR, setattr(FATTR_MODE, 0)),
        ("SETATTR of the size", SETATTR, setattr(FATTR_SIZE, 0)),
        ("SETATTR of the owner", SETATTR, setattr(FATTR_UID | FATTR_GID, 0)),
        ("SETATTR of the times", SETATTR, setattr(FATTR_ATIME | FATTR_MTIME, 0)),
        ("OPEN", OPEN, flags(libc::O_RDONLY)),
        ("OPEN and truncate", OPEN, flags(libc::O_RDWR | libc::O_TRUNC)),
        ("OPENDIR", OPENDIR, flags(libc::O_RDONLY)),
        ("SYNCFS", SYNCFS, longs([0])),
        ("STATFS", STATFS, Vec::new()),
        ("TMPFILE", TMPFILE, [&words([TMPFILE_FLAGS.cast_unsigned(), 0o644, 0, 0])[..], b"/\0"].concat()),
        ("ACCESS", ACCESS, words([7, 0])),
        ("SETXATTR", SETXATTR, [&words([1, 0, 0, 0])[..], xattr, b"x"].concat()),
        ("SETXATTR as root", SETXATTR, [&words([1, 0, 0, 0])[..], b"trusted.a\0", b"x"].concat()),
        ("GETXATTR", GETXATTR, [&words([64, 0])[..], xattr].concat()),
        ("LISTXATTR", LISTXATTR, words([64, 0])),
        ("REMOVEXATTR", REMOVEXATTR, xattr.to_vec()),
    ]
    .map(|(label, opcode, body)| (label.to_owned(), opcode, body))
    .into()
}

/// Sends a request that has no answer.
fn send_unanswered(guest: &mut Guest, opcode: u32, body: &[u8]) {
    let header = guest.header(opcode, ROOT, body.len());
    guest.bench.queues[1].add(&[&header, body], &[]);
    guest.bench.run_until(|queues| queues[1].poll().is_some());
}

#[test]
fn no_request_for_a_symlink_reaches_its_target() {
    for link in ["outfile", "out", "absolute"] {
        let tree = Tree::new();
        let mut guest = guest_of(&tree);
        let (around, _) = tree.state();
        let node = guest.lookup(ROOT, link);
        let file = guest.lookup(ROOT, "file");
        for name in [&b"outside\0"[..], b"empty\0", b"inner\0", b"new\0"] {
            for (label, opcode, body) in requests(node, file, name) {
                assert_eq!(
                    guest.error(opcode, node, &body),
                    libc::ENOTDIR,
                    "{label} in symlink {link} must return ENOTDIR"
                );
            }
        }
        for (label, opcode, body) in without_handle() {
            let error = guest.error(opcode, node, &body);
            let opens = matches!(opcode, OPEN | OPENDIR | SYNCFS) || label == "SETATTR of the size";
            assert!(
                !opens || error == libc::EBADF,
                "{label} for symlink {link} must return EBADF, but returned {error}"
            );
        }
        for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_RDONLY | libc::O_DIRECTORY] {
            let error = guest.error(CREATE, ROOT, &create(flags | libc::O_CREAT, link));
            assert!(
                [libc::EBADF, libc::EINVAL].contains(&error),
                "CREATE of symlink {link} must return EBADF or EINVAL, but returned {error}"
            );
        }
        let body = [longs([node]), b"hard\0".to_vec()].concat();
        assert_eq!(guest.error(LINK, ROOT, &body), 0);
        assert!(tree.share().join("hard").is_symlink());
        assert_eq!(differences(&around, &tree.state().0), Vec::<String>::new());
    }
}

#[test]
fn special_files_are_never_opened() {
    let tree = Tree::new();
    // There is only one worker thread. If a request blocked, the test would time out.
    let mut guest = guest_of(&tree);
    let mut names = vec!["fifo", "socket"];
    // Also create the device nodes of /dev/null and of a disk that no host has (major 60 is for local use). If the test
    // may not create device nodes, the test uses only the fifo and the socket.
    for (name, mode, device) in [("null", libc::S_IFCHR, 0x103), ("disk", libc::S_IFBLK, 0x3c00)] {
        let body = [words([mode | 0o666, device, 0, 0]), format!("{name}\0").into_bytes()].concat();
        if guest.error(MKNOD, ROOT, &body) == 0 {
            names.push(name);
        }
    }
    for name in names {
        let node = guest.lookup(ROOT, name);
        let access = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_ACCMODE];
        for access in access.into_iter().flat_map(|access| [access, access | libc::O_NONBLOCK]) {
            let truncate = flags(access | libc::O_TRUNC);
            assert_eq!(guest.error(OPEN, node, &flags(access)), libc::EBADF, "OPEN of {name} must return EBADF");
            assert_eq!(
                guest.error(OPEN, node, &truncate),
                libc::EBADF,
                "OPEN of {name} with O_TRUNC must return EBADF"
            );
            assert_eq!(guest.error(OPENDIR, node, &flags(access)), libc::EBADF, "OPENDIR of {name} must return EBADF");
            let create = create(access | libc::O_CREAT, name);
            assert_eq!(guest.error(CREATE, ROOT, &create), libc::EBADF, "CREATE of {name} must return EBADF");
        }
        for (label, opcode, body) in without_handle() {
            let error = guest.error(opcode, node, &body);
            let opens = matches!(opcode, OPEN | OPENDIR | SYNCFS) || label == "SETATTR of the size";
            assert!(!opens || error == libc::EBADF, "{label} for {name} must return EBADF, but returned {error}");
        }
    }
    guest.read_hello();
}

#[test]
fn mknod_rejects_directories_symlinks_and_unknown_types() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let before = tree.state();
    for mode in [libc::S_IFDIR | 0o755, libc::S_IFLNK | 0o777, libc::S_IFMT, 0o050_000, u32::MAX] {
        let body = [&words([mode, u32::MAX, 0, 0])[..], b"new\0"].concat();
        let error = guest.error(MKNOD, ROOT, &body);
        assert!(
            [libc::EINVAL, libc::EPERM].contains(&error),
            "MKNOD with mode {mode:o} must return EINVAL or EPERM, but returned {error}"
        );
    }
    assert_eq!(tree.state(), before);
}

#[test]
fn open_and_create_reject_o_tmpfile_and_o_path() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let file = guest.lookup(ROOT, "file");
    let before = tree.state();
    for flags_refused in [libc::O_TMPFILE | libc::O_RDWR, libc::O_PATH, libc::O_PATH | libc::O_DIRECTORY] {
        for node in [ROOT, file] {
            assert_eq!(guest.error(OPEN, node, &flags(flags_refused)), libc::EINVAL);
            assert_eq!(guest.error(OPENDIR, node, &flags(flags_refused)), libc::EINVAL);
        }
        for name in ["new", "file", "dir"] {
            assert_eq!(guest.error(CREATE, ROOT, &create(flags_refused, name)), libc::EINVAL);
        }
    }
    // On an existing node, O_CREAT has no effect, but O_CREAT with O_EXCL fails.
    assert_eq!(guest.error(OPEN, file, &flags(libc::O_RDWR | libc::O_CREAT)), 0);
    assert_eq!(guest.error(OPEN, file, &flags(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL)), libc::EEXIST);
    assert_eq!(guest.error(OPENDIR, ROOT, &flags(libc::O_RDONLY | libc::O_DIRECTORY)), 0);
    assert_eq!(tree.state(), before);
}

#[test]
fn unknown_nodes_are_rejected() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let file = guest.lookup(ROOT, "file");
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    let before = tree.state();
    for node in [0, file + 1, 1 << 32, u64::MAX] {
        let named = requests(node, node, b"file\0").into_iter().chain(requests(ROOT, node, b"new\0"));
        for (label, opcode, body) in named.chain(without_handle()).chain(with_handle(handle, node)) {
            assert_eq!(
                guest.error(opcode, node, &body),
                libc::EBADF,
                "{label} for unknown node {node} must return EBADF"
            );
        }
    }
    assert_eq!(tree.state(), before);
}

#[test]
fn handle_is_rejected_with_another_node() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (file, other) = (guest.lookup(ROOT, "file"), guest.lookup(ROOT, "hello"));
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    let other_handle = guest.open(OPEN, other, libc::O_RDWR);
    let before = tree.state();
    for (node, handle) in
        [(other, handle), (ROOT, handle), (file, other_handle), (file, other_handle + 1), (file, u64::MAX)]
    {
        for (label, opcode, body) in with_handle(handle, other) {
            assert_eq!(
                guest.error(opcode, node, &body),
                libc::EBADF,
                "{label} with the handle of another node must return EBADF"
            );
        }
    }
    let copy = longs([handle, 0, other, handle, 0, 3, 0]);
    assert_eq!(guest.error(COPY_FILE_RANGE, file, &copy), libc::EBADF);
    assert_eq!(tree.state(), before);
    let copy = longs([handle, 0, other, other_handle, 0, 3, 0]);
    assert_eq!(guest.error(COPY_FILE_RANGE, file, &copy), 0);
}

#[test]
fn requests_before_init_and_after_destroy_are_rejected() {
    let tree = Tree::new();
    let mut guest = Guest::with_share(&tree.share(), 1);
    let before = tree.state();
    let check_all_rejected = |guest: &mut Guest, node: u64, handle: u64| {
        let all = requests(ROOT, node, b"file\0").into_iter().chain(without_handle()).chain(with_handle(handle, node));
        for (label, opcode, body) in all {
            let error = guest.error(opcode, node, &body);
            // SETXATTR may also return EINVAL. The request has the longer body of FUSE_SETXATTR_EXT, although
            // FUSE_SETXATTR_EXT was not negotiated.
            let short = opcode == SETXATTR && error == libc::EINVAL;
            assert!(short || error == libc::EBADF, "{label} without INIT must return EBADF, but returned {error}");
        }
    };
    check_all_rejected(&mut guest, ROOT, 0);
    guest.init();
    let file = guest.lookup(ROOT, "file");
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    send_unanswered(&mut guest, DESTROY, b"");
    check_all_rejected(&mut guest, ROOT, handle);
    check_all_rejected(&mut guest, file, handle);
    // INIT must not restore nodes and handles, even if the guest sends INIT several times.
    for _ in 0..3 {
        guest.init();
        let stale: Vec<_> = without_handle().into_iter().chain(with_handle(handle, file)).collect();
        for (label, opcode, body) in stale {
            assert_eq!(guest.error(opcode, file, &body), libc::EBADF, "{label} for a stale node must return EBADF");
        }
    }
    assert_eq!(tree.state(), before);
    guest.read_hello();
}

#[test]
fn unsupported_opcodes_are_answered_with_enosys() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let before = tree.state();
    // The opcodes are BMAP, IOCTL, POLL, NOTIFY_REPLY, SETUPMAPPING, REMOVEMAPPING, STATX,
    // CUSE_INIT, and unknown opcodes.
    for opcode in [0, 7, 19, 37, 39, 40, 41, 48, 49, 52, 53, 4096, 1 << 20, u32::MAX] {
        for body in [&[0; 128][..], b"../outside\0", b""] {
            assert_eq!(guest.error(opcode, ROOT, body), libc::ENOSYS, "opcode {opcode} must return ENOSYS");
        }
    }
    assert_eq!(tree.state(), before);
}

#[test]
fn offsets_beyond_the_maximum_are_rejected() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let file = guest.lookup(ROOT, "file");
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    let before = tree.state();
    for offset in [1 << 63, u64::MAX - 1, u64::MAX] {
        let mut body = [longs([handle, offset]), words([3, 0, 0, 0, 0, 0])].concat();
        assert_eq!(guest.error(READ, file, &body), libc::EINVAL);
        body.extend(b"bad");
        assert_eq!(guest.error(WRITE, file, &body), libc::EINVAL);
    }
    assert_eq!(tree.state(), before);
}

#[test]
fn extensions_are_parsed_only_if_negotiated() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let before = tree.state();
    // The extension has a struct fuse_ext_header (one security context), a struct fuse_secctx, and the name and the
    // value of the attribute.
    let context = [&words([32, 1, 5, 0])[..], b"user.../x\0", b"value\0"].concat();
    let starts = [(MKDIR, words([0o755, 0])), (MKNOD, words([libc::S_IFREG | 0o644, 0, 0, 0]))];
    for (opcode, start) in &starts {
        let body = [start, &b"new\0"[..], &context].concat();
        assert_eq!(guest.error(*opcode, ROOT, &body), libc::EINVAL);
    }
    assert_eq!(tree.state(), before);
    // The guest now offers FUSE_SECURITY_CTX, but not FUSE_CREATE_SUPP_GROUP. virtiofsd never negotiates
    // FUSE_SECURITY_CTX, and therefore ignores the extensions.
    guest.init_with(SECURITY_CTX);
    for (opcode, start) in &starts {
        let body = [start, format!("new{opcode}\0").as_bytes(), &context].concat();
        assert_eq!(guest.error(*opcode, ROOT, &body), 0);
        let node = guest.lookup(ROOT, &format!("new{opcode}"));
        assert_eq!(guest.call(LISTXATTR, node, &words([64, 0]), 64), (0, Vec::new()));
    }
    assert_eq!(tree.state().0, before.0);
}
