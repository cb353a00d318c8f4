//! Tests of the mapping between names of extended attributes in the guest and on the host.
//!
//! The worker thread of the tested device has only the capabilities of a virtio-fs worker thread.

use std::ffi::CString;
use std::path::Path;

use husk_base::sys::xattr;

use super::names_tests::guest_of;
use super::test_guest::*;
use super::test_tree::Tree;

fn set(guest: &mut Guest, node: u64, name: &str, value: &[u8]) -> i32 {
    let body = [words([value.len() as u32, 0, 0, 0]), format!("{name}\0").into_bytes(), value.to_vec()].concat();
    guest.error(SETXATTR, node, &body)
}

fn get(guest: &mut Guest, node: u64, name: &str) -> Result<Vec<u8>, i32> {
    let body = [words([64, 0]), format!("{name}\0").into_bytes()].concat();
    match guest.call(GETXATTR, node, &body, 64) {
        (0, value) => Ok(value),
        (error, _) => Err(-error),
    }
}

fn remove(guest: &mut Guest, node: u64, name: &str) -> i32 {
    guest.error(REMOVEXATTR, node, format!("{name}\0").as_bytes())
}

/// Returns the names of a node's attributes in the guest.
fn list(guest: &mut Guest, node: u64) -> Vec<String> {
    let (error, names) = guest.call(LISTXATTR, node, &words([1024, 0]), 1024);
    assert_eq!(error, 0);
    split(&names)
}

/// Returns the names of a file's attributes on the host.
fn list_on_host(path: &Path) -> Vec<String> {
    split(&xattr::list(path).unwrap())
}

fn split(names: &[u8]) -> Vec<String> {
    let mut names: Vec<_> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

fn set_on_host(path: &Path, name: &str) {
    let set = xattr::set(path, &CString::new(name).unwrap(), b"of the host");
    set.expect("this test needs root, because it sets trusted attributes");
}

#[test]
fn trusted_and_security_attributes_of_the_guest_are_user_attributes_of_the_host() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    for file in ["file", "hollow"] {
        let (node, path) = (guest.lookup(ROOT, file), tree.share().join(file));
        let names = ["security.ima", "security.selinux", "trusted.overlay.opaque"];
        for name in names {
            assert_eq!(set(&mut guest, node, name, name.as_bytes()), 0, "SETXATTR of {name}");
        }
        for name in names {
            assert_eq!(get(&mut guest, node, name), Ok(name.as_bytes().to_vec()), "GETXATTR of {name}");
        }
        assert_eq!(list(&mut guest, node), names);
        assert_eq!(list_on_host(&path), names.map(|name| format!("user.husk.{name}")));
        for name in names {
            assert_eq!(remove(&mut guest, node, name), 0, "REMOVEXATTR of {name}");
        }
        assert_eq!(list_on_host(&path), [""; 0]);
    }
}

#[test]
fn file_capabilities_and_user_attributes_have_the_same_names_on_the_host() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let node = guest.lookup(ROOT, "file");
    // struct vfs_cap_data of revision 2, with CAP_NET_BIND_SERVICE in the permitted set (linux/capability.h).
    let capability = words([0x0200_0000, 1 << 10, 0, 0, 0]);
    assert_eq!(set(&mut guest, node, "security.capability", &capability), 0);
    assert_eq!(set(&mut guest, node, "user.overlay.opaque", b"y"), 0);
    let names = ["security.capability", "user.overlay.opaque"];
    assert_eq!(
        (list(&mut guest, node), list_on_host(&tree.share().join("file"))),
        (names.map(str::to_owned).to_vec(), names.map(str::to_owned).to_vec())
    );
    assert_eq!(get(&mut guest, node, "security.capability"), Ok(capability));
}

#[test]
fn guest_cannot_use_the_names_of_mapped_attributes() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, path) = (guest.lookup(ROOT, "file"), tree.share().join("file"));
    assert_eq!(set(&mut guest, node, "trusted.a", b"value"), 0);
    for name in ["user.husk.trusted.a", "user.husk.trusted.b", "user.husk.", "user.husk.user.a"] {
        assert_eq!(set(&mut guest, node, name, b"changed"), libc::EPERM, "SETXATTR of {name}");
        assert_eq!(get(&mut guest, node, name), Err(libc::ENODATA), "GETXATTR of {name}");
        assert_eq!(remove(&mut guest, node, name), libc::EPERM, "REMOVEXATTR of {name}");
    }
    assert_eq!(get(&mut guest, node, "trusted.a"), Ok(b"value".to_vec()));
    assert_eq!(list_on_host(&path), ["user.husk.trusted.a"]);
}

#[test]
fn guest_does_not_see_trusted_and_security_attributes_of_the_host() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    let (node, path) = (guest.lookup(ROOT, "hollow"), tree.share().join("hollow"));
    let names = ["security.selinux", "trusted.a", "trusted.overlay.opaque"];
    names.iter().for_each(|name| set_on_host(&path, name));
    assert_eq!(list(&mut guest, node), [""; 0]);
    for name in names {
        assert_eq!(get(&mut guest, node, name), Err(libc::ENODATA), "GETXATTR of {name}");
        assert_eq!(remove(&mut guest, node, name), libc::ENODATA, "REMOVEXATTR of {name}");
        assert_eq!(set(&mut guest, node, name, b"of the guest"), 0, "SETXATTR of {name}");
        let mut value = [0; 64];
        let length = xattr::get(&path, &CString::new(name).unwrap(), &mut value).unwrap();
        assert_eq!(&value[..length], b"of the host", "{name}");
    }
}

#[test]
fn trusted_attributes_exist_only_for_regular_files_and_directories() {
    let tree = Tree::new();
    let mut guest = guest_of(&tree);
    for file in ["outfile", "fifo", "socket"] {
        let node = guest.lookup(ROOT, file);
        assert_eq!(set(&mut guest, node, "trusted.a", b"value"), libc::EPERM, "SETXATTR of {file}");
        assert_eq!(get(&mut guest, node, "trusted.a"), Err(libc::ENODATA), "GETXATTR of {file}");
        assert_eq!(list(&mut guest, node), [""; 0], "LISTXATTR of {file}");
    }
}
