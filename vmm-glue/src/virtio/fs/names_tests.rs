//! Tests of names in FUSE requests. Every operation must reject a hostile name, and must not change any file.

use std::fs;
use std::os::unix::ffi::OsStrExt;

use super::test_guest::*;
use super::test_tree::{Tree, differences};

/// FUSE_CREATE_SUPP_GROUP: bit 34 of the INIT flags, and therefore bit 2 of `flags2`. Linux offers this flag since 6.3.
/// If this flag is negotiated, virtiofsd parses the bytes after a name as extensions.
pub const CREATE_SUPP_GROUP: u32 = 1 << 2;
const FILE_MODE: u32 = libc::S_IFREG | 0o644;

/// A request: its label in messages, its opcode and its body.
pub type Request = (String, u32, Vec<u8>);

/// Returns at least one request for each operation that takes the name of a directory entry. `directory` and `file` are
/// node ids.
pub fn requests(directory: u64, file: u64, name: &[u8]) -> Vec<Request> {
    let with = |start: Vec<u8>| [&start, name].concat();
    let create = |flags: i32| with(words([flags.cast_unsigned(), 0o644, 0, 0]));
    let mut requests: Vec<Request> = [
        ("LOOKUP", LOOKUP, name.to_vec()),
        ("MKDIR", MKDIR, with(words([0o755, 0]))),
        ("MKNOD of a file", MKNOD, with(words([FILE_MODE, 0, 0, 0]))),
        ("MKNOD of a fifo", MKNOD, with(words([libc::S_IFIFO | 0o644, 0, 0, 0]))),
        ("SYMLINK", SYMLINK, [name, b"../../target\0"].concat()),
        ("UNLINK", UNLINK, name.to_vec()),
        ("RMDIR", RMDIR, name.to_vec()),
        ("CREATE", CREATE, create(libc::O_RDWR | libc::O_CREAT)),
        ("CREATE exclusively", CREATE, create(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL)),
        ("CREATE and truncate", CREATE, create(libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC)),
        ("LINK", LINK, with(longs([file]))),
    ]
    .map(|(label, opcode, body)| (label.to_owned(), opcode, body))
    .into();
    for (which, names) in [
        ("old name", [name, b"new\0"].concat()),
        ("new name", [b"file\0", name].concat()),
        ("new name of a directory", [b"hollow\0", name].concat()),
        ("both names", [name, name].concat()),
    ] {
        let body = [longs([directory]), names.clone()].concat();
        requests.push((format!("RENAME, {which}"), RENAME, body));
        for flags in [0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE, libc::RENAME_WHITEOUT] {
            let body = [longs([directory]), words([flags, 0]), names.clone()].concat();
            requests.push((format!("RENAME2 {flags}, {which}"), RENAME2, body));
        }
    }
    requests
}

/// Returns hostile names, as the bytes of a request, each with the expected error. No directory entry can have such a
/// name. If the device did not check names, these names would lead only to files of the test's tree.
fn hostile_names(tree: &Tree) -> Vec<(Vec<u8>, i32)> {
    let mut names = vec![
        (b"".to_vec(), libc::EINVAL),
        (b"new".to_vec(), libc::EINVAL),
        (b"file".to_vec(), libc::EINVAL),
        (b"ne\0w\0".to_vec(), libc::EINVAL),
        (b"fi\0le\0".to_vec(), libc::EINVAL),
        ([&[b'n'; 256][..], b"\0"].concat(), libc::ENAMETOOLONG),
        ([&b"../".repeat(2000)[..], b"\0"].concat(), libc::EINVAL),
    ];
    names.extend(HOSTILE_NAMES.map(|name| (format!("{name}\0").into_bytes(), libc::EINVAL)));
    for name in ["outside", "empty", "new", "full/inner"] {
        let path = tree.top().join(name);
        names.push(([path.as_os_str().as_bytes(), b"\0"].concat(), libc::EINVAL));
    }
    names
}

/// Sends a request that must fail and must not change any file. Returns a description of all violations, or `None` if
/// there is no violation.
fn check_rejected(
    tree: &Tree,
    guest: &mut Guest,
    request: &Request,
    parent: u64,
    expected_error: i32,
) -> Option<String> {
    let (around, inside) = tree.state();
    let error = guest.error(request.1, parent, &request.2);
    let (around_after, inside_after) = tree.state();
    let mut failures = differences(&around, &around_after);
    failures.extend(differences(&inside, &inside_after));
    if error != expected_error {
        failures.insert(0, format!("the error is {error} instead of {expected_error}"));
    }
    (!failures.is_empty()).then(|| failures.join("; "))
}

/// Returns a guest whose share is the tree's share.
pub fn guest_of(tree: &Tree) -> Guest {
    let mut guest = Guest::with_share(&tree.share(), 1);
    guest.init_with(CREATE_SUPP_GROUP);
    guest
}

#[test]
fn every_operation_rejects_names_that_cannot_be_directory_entries() {
    let mut failures = Vec::new();
    let mut tree = Tree::new();
    let mut guest = guest_of(&tree);
    let count = requests(ROOT, ROOT, b"\0").len();
    for parent in ["", "dir"] {
        for at in 0..hostile_names(&tree).len() {
            for request in 0..count {
                let file = guest.lookup(ROOT, "file");
                let node = if parent.is_empty() { ROOT } else { guest.lookup(ROOT, parent) };
                let (name, expected_error) = hostile_names(&tree).swap_remove(at);
                let request = requests(node, file, &name).swap_remove(request);
                if let Some(failure) = check_rejected(&tree, &mut guest, &request, node, expected_error) {
                    let mut name = String::from_utf8_lossy(&name).into_owned();
                    name.truncate(40);
                    failures.push(format!("{} of {name:?} in {parent:?}: {failure}", request.0));
                    tree = Tree::new();
                    guest = guest_of(&tree);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} requests were not rejected as expected:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn operations_accept_all_names_that_directory_entries_can_have() {
    let names: [&[u8]; 9] = [b"plain", b"...", b"..a", b".a", b"a..", b"a\\b", b"\xff\xfe\x80", b"a\nb", &[b'n'; 255]];
    for name in names {
        let tree = Tree::new();
        let mut guest = guest_of(&tree);
        let file = guest.lookup(ROOT, "file");
        let name = [name, b"\0"].concat();
        let at = tree.share().join(std::ffi::OsStr::from_bytes(&name[..name.len() - 1]));
        let mut rename = |from: &[u8], to: &[u8]| {
            let body = [longs([ROOT]).as_slice(), from, to].concat();
            assert_eq!(guest.error(RENAME, ROOT, &body), 0);
        };
        rename(b"file\0", &name);
        rename(&name, b"file\0");
        for (label, opcode, body) in requests(ROOT, file, &name).into_iter().skip(1) {
            let creates = match opcode {
                MKDIR | MKNOD | SYMLINK | CREATE | LINK => true,
                _ => continue,
            };
            assert_eq!(guest.error(opcode, ROOT, &body), 0, "{label} with name {name:?} failed");
            assert_eq!(fs::symlink_metadata(&at).is_ok(), creates);
            assert_eq!(guest.error(LOOKUP, ROOT, &name), 0, "LOOKUP of {name:?} failed");
            let remove = if opcode == MKDIR { RMDIR } else { UNLINK };
            assert_eq!(guest.error(remove, ROOT, &name), 0, "removing {name:?} with opcode {remove} failed");
            assert!(fs::symlink_metadata(&at).is_err());
        }
    }
}

#[test]
fn symlink_to_any_target_is_created_and_not_followed() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (around, _) = tree.state();
    for (name, target) in [("a", "../../far"), ("b", ".."), ("c", "/"), ("d", "a//b/./c/"), ("e", "../outside")] {
        let body = format!("{name}\0{target}\0");
        assert_eq!(guest.error(SYMLINK, ROOT, body.as_bytes()), 0);
        let node = guest.lookup(ROOT, name);
        assert_eq!(guest.call(READLINK, node, b"", ANSWER_SIZE), (0, target.as_bytes().to_vec()));
        assert_eq!(guest.error(LOOKUP, node, b"far\0"), libc::ENOTDIR);
    }
    assert_eq!(differences(&around, &tree.state().0), Vec::<String>::new());
}

#[test]
fn xattr_name_with_slashes_is_not_resolved_as_a_path() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let file = guest.lookup(ROOT, "file");
    for name in ["user.a/b", "user./", "user...", "user.../../outside"] {
        let name = format!("{name}\0").into_bytes();
        let set = [&words([5, 0, 0, 0])[..], &name, b"value"].concat();
        assert_eq!(guest.error(SETXATTR, file, &set), 0, "SETXATTR of {name:?} failed");
        let get = [&words([64, 0])[..], &name].concat();
        assert_eq!(guest.call(GETXATTR, file, &get, 64), (0, b"value".to_vec()));
        let (error, names) = guest.call(LISTXATTR, file, &words([64, 0]), 64);
        assert_eq!((error, names), (0, name.clone()));
        assert_eq!(guest.error(REMOVEXATTR, file, &name), 0);
    }
}

#[test]
fn readdirplus_returns_all_entries_with_their_nodes() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let handle = guest.open(OPENDIR, ROOT, libc::O_RDONLY);
    let body = [longs([handle, 0]), words([8192, 0, 0, 0, 0, 0])].concat();
    let (error, mut entries) = guest.call(READDIRPLUS, ROOT, &body, 8192 + 16);
    assert_eq!(error, 0);
    let mut names = Vec::new();
    while !entries.is_empty() {
        // struct fuse_direntplus has 128 bytes of fuse_entry_out, then ino, off, namelen, type and the name.
        let len = u32::from_le_bytes(entries[144..148].try_into().unwrap()) as usize;
        let name = String::from_utf8(entries[152..152 + len].to_vec()).unwrap();
        let dots = name == "." || name == "..";
        assert_eq!(u64_at(&entries, 0) == 0, dots, "wrong node of {name:?}: only `.` and `..` must have node 0");
        names.push(name);
        entries.drain(..152 + len.next_multiple_of(8));
    }
    names.sort_unstable();
    let all = [".", "..", "absolute", "dir", "fifo", "file", "hello", "hollow", "out", "outfile", "socket"];
    assert_eq!(names, all);
}
