//! The kernel's fd-based mount calls, which neither libc nor nix wraps.
//!
//! Numbers and structures are those of linux/mount.h. `mount_setattr` needs Linux 5.12, and Linux 5.14 for the
//! attribute `MOUNT_ATTR_NOSYMFOLLOW`. The other calls need Linux 5.2.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::new_fd;

/// `OPEN_TREE_CLONE`: opens a detached copy of the mount, like the copy that a bind mount attaches.
const OPEN_TREE_CLONE: libc::c_uint = 1;
/// `OPEN_TREE_CLOEXEC`, which is O_CLOEXEC.
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
/// `AT_RECURSIVE`.
const AT_RECURSIVE: libc::c_uint = 0x8000;
/// `AT_EMPTY_PATH`.
const AT_EMPTY_PATH: libc::c_uint = libc::AT_EMPTY_PATH as libc::c_uint;
/// `MOVE_MOUNT_F_EMPTY_PATH` and `MOVE_MOUNT_T_EMPTY_PATH`: the mount and the target are given as fds, with empty
/// paths.
const MOVE_MOUNT_EMPTY_PATHS: libc::c_uint = 0x4 | 0x40;
/// `MOUNT_ATTR_RDONLY`.
pub const MOUNT_ATTR_RDONLY: u64 = 1;
/// `MOUNT_ATTR_IDMAP`.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Returns the id of the mount on which `file` was opened, from proc_pid_fdinfo(5).
///
/// statx(2) also returns the mount id, but asks the file system for attributes. If the server of a network file system
/// is gone, the file system never answers, and statx(2) blocks.
///
/// # Errors
/// The errors of reading the file in `/proc`.
pub fn mount_id(file: BorrowedFd<'_>) -> io::Result<u64> {
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fdinfo has no line with a mount id"))
}

/// Creates a detached copy of the mount at `source`, with its submounts if `recursive`. The fd is close-on-exec.
///
/// # Errors
/// The errors of open_tree(2).
pub fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string that ends with NUL, and the call takes no other pointer. It returns a new fd
    // or -1.
    unsafe { new_fd(libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags)) }
}

/// Sets attributes and the propagation of a mount, and of its submounts if `recursive`. `propagation` is a type
/// such as `MS_PRIVATE`, or 0 to keep the current propagation.
///
/// # Errors
/// The errors of mount_setattr(2).
pub fn set_attributes(tree: BorrowedFd<'_>, set: u64, propagation: u64, recursive: bool) -> io::Result<()> {
    setattr(tree, &MountAttr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 }, recursive)
}

/// Applies the id mappings of a user namespace to a detached mount, and to its submounts if `recursive`. Needs Linux
/// 5.12, or Linux 5.19 if the mount is a layer of an overlayfs.
///
/// # Errors
/// The errors of mount_setattr(2).
pub fn set_id_mapping(tree: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let userns_fd = u64::from(user_namespace.as_raw_fd().unsigned_abs());
    setattr(tree, &MountAttr { attr_set: MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd }, recursive)
}

fn setattr(tree: BorrowedFd<'_>, attributes: &MountAttr, recursive: bool) -> io::Result<()> {
    let flags = AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    let attributes = std::ptr::from_ref(attributes);
    let size = size_of::<MountAttr>();
    // SAFETY: the path is an empty string that ends with NUL, and `attributes` has the given size.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, tree.as_raw_fd(), c"".as_ptr(), flags, attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a detached mount at `target`.
///
/// # Errors
/// The errors of move_mount(2).
pub fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let (from, to) = (tree.as_raw_fd(), target.as_raw_fd());
    let path = c"".as_ptr();
    // SAFETY: both paths are empty strings that end with NUL, and the call takes no other pointer.
    match unsafe { libc::syscall(libc::SYS_move_mount, from, path, to, path, MOVE_MOUNT_EMPTY_PATHS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "the fds in /proc are those of the interpreter")]
    fn mount_id_differs_between_file_systems() {
        let id = |path: &str| mount_id(File::open(path).unwrap().as_fd()).unwrap();
        assert_eq!(id("/proc/self/status"), id("/proc/version"));
        assert_ne!(id("/proc"), id("/sys"));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no open_tree")]
    fn cloned_tree_can_be_made_read_only() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "x").unwrap();
        let source = File::open(directory.path()).unwrap();
        let tree = clone_tree(source.as_fd(), true).expect("this test needs root, because it clones mounts");
        set_attributes(tree.as_fd(), MOUNT_ATTR_RDONLY, libc::MS_PRIVATE, true).unwrap();
        let file = format!("/proc/self/fd/{}/file", tree.as_raw_fd());
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
        assert_eq!(fs::write(&file, "y").unwrap_err().raw_os_error(), Some(libc::EROFS));
        // The kernel does not mount a directory on a file.
        let target = File::open(directory.path().join("file")).unwrap();
        assert!(attach(tree.as_fd(), target.as_fd()).is_err());
    }
}
