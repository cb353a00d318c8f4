//! Requests for range locks: checking them, and the argument of fcntl(2).

use std::io;

use virtiofsd::fuse::{FileLock, LkIn};

use super::super::ids::{Handle, Inode};
use super::ranges::RangeLock;
use super::table::Owner;

/// The lock belongs to an open file: FUSE_LK_OFD in guest/kernel/patches.
const OPEN_FILE: u32 = 1 << 31;
/// Last byte of the largest file: OFFSET_MAX in include/linux/fs.h.
pub const LAST_BYTE: u64 = i64::MAX.cast_unsigned();

/// A change of an owner's locks.
#[derive(Clone, Copy)]
pub struct Change {
    /// The file.
    pub inode: Inode,
    /// The guest's handle of the file.
    pub handle: Handle,
    /// Owner of the locks.
    pub owner: Owner,
    /// Whether the owner is an open file, and not a process.
    pub open_file: bool,
    /// The guest's PID of the process that makes the request.
    pub pid: u32,
    /// The range. `exclusive` has no meaning if the range is unlocked.
    pub range: RangeLock,
    /// Whether the range is unlocked.
    pub unlock: bool,
}

/// Returns the error with an error number.
pub fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Change {
    /// Checks a request for a range lock.
    pub fn decode(inode: Inode, request: &LkIn) -> io::Result<Self> {
        let LkIn { fh, owner, lk: FileLock { start, end, type_, pid }, lk_flags, .. } = *request;
        let (unlock, exclusive) = match i32::try_from(type_) {
            Ok(libc::F_RDLCK) => (false, false),
            Ok(libc::F_WRLCK) => (false, true),
            Ok(libc::F_UNLCK) => (true, false),
            _ => return Err(error(libc::EINVAL)),
        };
        if start > end || end > LAST_BYTE {
            return Err(error(libc::EINVAL));
        }
        let range = RangeLock { start, end, exclusive };
        let open_file = lk_flags & OPEN_FILE != 0;
        Ok(Self { inode, handle: fh, owner: Owner(owner), open_file, pid, range, unlock })
    }

    /// Returns the argument of fcntl(2).
    pub fn to_kernel(self) -> libc::flock {
        let kind = match (self.unlock, self.range.exclusive) {
            (true, _) => libc::F_UNLCK,
            (false, true) => libc::F_WRLCK,
            (false, false) => libc::F_RDLCK,
        };
        // The length 0 stands for all bytes up to the last one.
        let len = if self.range.end >= LAST_BYTE { 0 } else { self.range.end - self.range.start + 1 };
        libc::flock {
            l_type: i16::try_from(kind).unwrap_or(0),
            l_whence: 0,
            l_start: i64::try_from(self.range.start).unwrap_or(0),
            l_len: i64::try_from(len).unwrap_or(0),
            l_pid: 0,
        }
    }
}
