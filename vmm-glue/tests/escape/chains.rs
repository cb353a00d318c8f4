//! Attempts with several steps. Each step needs the one before it. The attempts change mounts to reach a device of the
//! host.

use std::ffi::CStr;

use syscalls::{Errno, Sysno, syscall};

use crate::Stopped;
use crate::attempts::{AT_FDCWD, read, text};
use crate::payload::Inside;

// linux/mount.h
const OPEN_TREE_CLONE: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
/// The attributes that the share's mount has: MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC.
const ATTRIBUTES: u64 = 1 | 2 | 4 | 8;

/// Clears `nodev` and similar flags of a mount.
pub fn clear_nodev(directory: i32, path: &'static CStr, flags: i32) -> Result<(), Errno> {
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
        // EEXIST: another process in the jail has already made the node.
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

pub fn device_of_devtmpfs(_: &Inside) -> Result<String, Stopped> {
    read(new_mount(c"devtmpfs")?, c"zero", libc::O_RDONLY)
}

/// Every mount of devtmpfs shows the files of the host's `/dev`. Therefore, the attempt sets the mode that the device
/// already has, and changes nothing on the host if it succeeds.
pub fn mode_in_devtmpfs(_: &Inside) -> Result<String, Stopped> {
    let mount = new_mount(c"devtmpfs")?;
    // SAFETY: the path is a static text.
    unsafe { syscall!(Sysno::fchmodat, mount, text(c"zero"), 0o666)? };
    Ok("set the mode of /dev/zero".to_owned())
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

/// In a new user namespace, a process has all capabilities over a copy of the mounts. But the kernel does not let the
/// process clear flags of the copies.
pub fn disk_in_user_namespace(inside: &Inside) -> Result<String, Stopped> {
    // The new process may not make device nodes. Therefore, this process tries to make the node first. Otherwise, the
    // new process would fail because the node does not exist.
    let _ = read_disk(inside, AT_FDCWD);
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::SIGCHLD;
    let mut status = 0i32;
    // SAFETY: the new process has a copy of this memory, and only makes system calls. The status outlives the call.
    unsafe {
        let child = syscall!(Sysno::clone, flags, 0, 0, 0, 0)?;
        if child == 0 {
            let result = read_without_nodev();
            let _ = syscall!(Sysno::exit_group, result.err().map_or(0, Errno::into_raw));
        }
        syscall!(Sysno::wait4, child, &raw mut status, 0, 0)?;
    }
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok("read the disk".to_owned()),
        errno if libc::WIFEXITED(status) => Err(Stopped::Errno(errno)),
        _ => Err(Stopped::Unclear(format!("the new process ended with status {status}"))),
    }
}

/// Tries to clear `nodev` of the share, and reads the disk. Only makes system calls, because a process that clone(2)
/// created in a process with threads must not allocate memory.
fn read_without_nodev() -> Result<(), Errno> {
    let mut byte = 0u8;
    // If the flag is still set, opening the node fails with EACCES. A failed clone(2)
    // gives a different errno. Therefore, EACCES shows that clone(2) has succeeded.
    let _ = clear_nodev(AT_FDCWD, c"/", 0);
    // SAFETY: the path is a static text, and the buffer outlives the call.
    unsafe {
        let disk = syscall!(Sysno::openat, AT_FDCWD, text(c"disk"), libc::O_RDONLY)?;
        syscall!(Sysno::read, disk, &raw mut byte, 1)?;
    }
    Ok(())
}
