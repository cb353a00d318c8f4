//! Checks of FUSE requests that virtiofsd 1.14 does not make.
//!
//! virtiofsd expects that its root directory is the root of the process (pivot_root(2)). Here the host's files are in reach.

use std::ffi::CStr;
use std::io;

/// Part of O_TMPFILE that O_DIRECTORY is not (include/uapi/asm-generic/fcntl.h). arm64's O_DIRECTORY is another bit.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Checks that this can be the name of a directory entry.
///
/// unlinkat(2), mkdirat(2), mknodat(2), symlinkat(2), linkat(2) and renameat2(2) get the name as a path: one with a slash,
/// or `..`, is an entry of another directory. The guest's kernel sends none: it has resolved the path itself.
/// Only for file handles does it look up `.` and `..`, if FUSE_EXPORT_SUPPORT was negotiated (fuse_get_dentry() and
/// fuse_get_parent() in fs/fuse/inode.c). virtiofsd negotiates it neither in `Server::init()` (server.rs) nor in
/// `PassthroughFs::init()` (passthrough/mod.rs), and its READDIRPLUS looks up neither (`handle_dirent()` in server.rs).
///
/// # Errors
/// EINVAL when not.
pub fn name(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    refuse(matches!(name, b"" | b"." | b"..") || name.contains(&b'/'))
}

/// Checks that these flags only open an existing file.
///
/// open(2) of the directory with O_TMPFILE makes a file that no node stands for; a handle by O_PATH is none to read or
/// write by. The guest's kernel sends neither: it has FUSE_TMPFILE, and O_PATH never reaches a file system.
///
/// # Errors
/// EINVAL when not.
pub fn open_flags(flags: u32) -> io::Result<()> {
    refuse(flags.cast_signed() & (TMPFILE | libc::O_PATH) != 0)
}

/// Checks that a file can have data at this offset. virtiofsd panics otherwise (file_traits.rs), which ends the process.
///
/// # Errors
/// EINVAL when not.
pub fn offset(offset: u64) -> io::Result<()> {
    refuse(i64::try_from(offset).is_err())
}

fn refuse(whether: bool) -> io::Result<()> {
    if whether { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
}
