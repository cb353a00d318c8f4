//! Attempts with several steps. Each step needs the one before it. The attempts change mounts to reach a device of the
//! host.

use std::ffi::CStr;

use syscalls::{Errno, Sysno, syscall};

use crate::Stopped;
use crate::attempts::{AT_FDCWD, read, text};
use crate::payload::Inside;

/// Why no other wall stops a virtio-fs worker thread that clears `nodev`.
pub const CLEAR_NODEV: &str = "**the filters are the only wall**: the virtio-fs server needs CAP_SYS_ADMIN for \
    trusted.* attributes, and CAP_MKNOD for MKNOD";

// linux/mount.h
const OPEN_TREE_CLONE: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
/// The attributes that the share's mount has: MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC.
const ATTRIBUTES: u64 = 1 | 2 | 4 | 8;

/// Clears `nodev` and similar flags of a mount.
pub fn clear_nodev(directory: i32, path: &'static CStr, flags: i32) -> Result<(), Stopped> {
    // The attributes to set, the attributes to clear, the propagation and the user namespace.
    let attributes = [0u64, ATTRIBUTES, 0, 0];
    // SAFETY: the path is a static text, and the attributes outlive the call.
    unsafe { syscall!(Sysno::mount_setattr, directory, text(path), flags, attributes.as_ptr(), 32)? };
    Ok(())
}

/// Makes a device node of the test's disk, and reads the disk.
fn read_disk(inside: &Inside, directory: i32) -> Result<String, Stopped> {
    // SAFETY: the path is a static text.
    match unsafe { syscall!(Sysno::mknodat, directory, text(c"disk"), libc::S_IFBLK | 0o600, inside.disk) } {
        // Another process in the jail made the node.
        Ok(_) | Err(Errno::EEXIST) => read(directory, c"disk", libc::O_RDONLY),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes a mount that is not attached to the tree of mounts. The mount lacks `nodev`.
fn new_mount(kind: &'static CStr) -> Result<i32, Stopped> {
    // SAFETY: the type of the file system is a static text.
    let mount = unsafe {
        let context = syscall!(Sysno::fsopen, text(kind), 0)?;
        syscall!(Sysno::fsconfig, context, FSCONFIG_CMD_CREATE, 0, 0, 0)?;
        syscall!(Sysno::fsmount, context, 0, 0)?
    };
    Ok(mount as i32)
}

pub fn attach_new_mount(_: &Inside) -> Result<String, Stopped> {
    let mount = new_mount(c"tmpfs")?;
    // SAFETY: the paths are static texts.
    unsafe { syscall!(Sysno::move_mount, mount, text(c""), AT_FDCWD, text(c"/"), MOVE_MOUNT_F_EMPTY_PATH)? };
    Ok("mounted a tmpfs".to_owned())
}

pub fn devtmpfs(_: &Inside) -> Result<String, Stopped> {
    read(new_mount(c"devtmpfs")?, c"zero", libc::O_RDONLY)
}

pub fn disk_in_share(inside: &Inside) -> Result<String, Stopped> {
    read_disk(inside, AT_FDCWD)
}

pub fn disk_on_new_mount(inside: &Inside) -> Result<String, Stopped> {
    read_disk(inside, new_mount(c"tmpfs")?)
}

pub fn disk_without_nodev(inside: &Inside) -> Result<String, Stopped> {
    clear_nodev(AT_FDCWD, c"/", 0)?;
    read_disk(inside, AT_FDCWD)
}

pub fn disk_on_clone(inside: &Inside) -> Result<String, Stopped> {
    // SAFETY: the path is a static text.
    let clone = unsafe { syscall!(Sysno::open_tree, AT_FDCWD, text(c"/"), OPEN_TREE_CLONE)? } as i32;
    clear_nodev(clone, c"", libc::AT_EMPTY_PATH)?;
    read_disk(inside, clone)
}
