//! Checks FUSE requests for values that virtiofsd 1.14 passes on to the kernel unchecked.
//!
//! virtiofsd relies on a sandbox in which the shared directory is the root directory of the process (pivot_root(2)).
//! These checks protect the host's files even if the VMM has another root directory.

use std::ffi::CStr;
use std::io;

/// The bits of O_TMPFILE without O_DIRECTORY, which O_TMPFILE includes (include/uapi/asm-generic/fcntl.h). O_DIRECTORY
/// is not the same bit on arm64 and on x86.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Checks that a name can be the name of a directory entry. Returns EINVAL if the name is empty, is `.` or `..`, or
/// contains a slash.
///
/// virtiofsd passes the name to unlinkat(2), mkdirat(2), mknodat(2), symlinkat(2), linkat(2) and renameat2(2). These
/// calls take a path. Therefore, a name with a slash, or `..`, would refer to an entry of another directory. The
/// guest's kernel resolves paths itself and does not send such a name.
///
/// The guest's kernel looks up `.` and `..` only for file handles, if FUSE_EXPORT_SUPPORT was negotiated
/// (fuse_get_dentry() and fuse_get_parent() in fs/fuse/inode.c). virtiofsd negotiates FUSE_EXPORT_SUPPORT neither in
/// `Server::init()` (server.rs) nor in `PassthroughFs::init()` (passthrough/mod.rs). virtiofsd's READDIRPLUS does
/// not look up these two names (`handle_dirent()` in server.rs).
pub fn name(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    reject_if(matches!(name, b"" | b"." | b"..") || name.contains(&b'/'))
}

/// Checks the flags of open(2). Returns EINVAL if the flags contain O_TMPFILE or O_PATH.
///
/// O_TMPFILE on a directory creates a file to which no node refers. An O_PATH handle cannot be read or written. The
/// guest's kernel sends neither flag. The kernel sends FUSE_TMPFILE instead of O_TMPFILE, and opens a file with O_PATH
/// without calling the file system.
pub fn open_flags(flags: u32) -> io::Result<()> {
    reject_if(flags.cast_signed() & (TMPFILE | libc::O_PATH) != 0)
}

/// Checks a file offset. Returns EINVAL if the offset is above 2^63 - 1. With such an offset, virtiofsd would panic
/// (file_traits.rs), and a panic ends the VMM.
pub fn offset(offset: u64) -> io::Result<()> {
    reject_if(i64::try_from(offset).is_err())
}

/// Checks the mode of FALLOCATE. Accepts the modes that the guest's kernel sends (fuse_file_fallocate() in
/// fs/fuse/file.c, with the patches in guest/kernel/patches). For others, returns EOPNOTSUPP, as Linux does for modes
/// that a file system lacks.
///
/// FALLOC_FL_COLLAPSE_RANGE and FALLOC_FL_INSERT_RANGE move extents, but no data. Like the other accepted modes, they
/// change only the file system's metadata.
///
/// FALLOC_FL_UNSHARE_RANGE is one of the other modes. With this mode, XFS copies all data of the range. The request
/// cannot be answered in parts, and therefore the rate limit of bytes could not bound the copy.
pub fn fallocate_mode(mode: u32) -> io::Result<()> {
    let sent = libc::FALLOC_FL_KEEP_SIZE
        | libc::FALLOC_FL_PUNCH_HOLE
        | libc::FALLOC_FL_ZERO_RANGE
        | libc::FALLOC_FL_COLLAPSE_RANGE
        | libc::FALLOC_FL_INSERT_RANGE;
    if mode.cast_signed() & !sent == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
}

fn reject_if(invalid: bool) -> io::Result<()> {
    if invalid { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
}
