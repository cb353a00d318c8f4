//! Closes files of virtiofsd's file system without its locks.
//!
//! close(2) can hang. For example, a network file system writes data back, and a frozen file system cannot free an
//! unlinked file. virtiofsd 1.14 closes a handle while it holds the lock of all handles (`do_release()` in
//! passthrough/mod.rs). It closes the O_PATH fd of a node while it holds the lock of all nodes
//! (`InodeStore::forget_one()`). Every request needs these locks. Therefore, one hanging close(2) would stop the
//! requests for all file systems.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem, ZeroCopyWriter};
use virtiofsd::oslib::ReadvFlags;

use super::ids::{Handle, Inode};

/// A writer that reads nothing, and calls a function with the file instead.
struct Caller<'a, F, T> {
    call: Option<F>,
    result: &'a mut Option<io::Result<T>>,
}

impl<F: FnOnce(&File) -> io::Result<T>, T> ZeroCopyWriter for Caller<'_, F, T> {
    fn read_from_file_at(&mut self, file: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        *self.result = self.call.take().map(|call| call(file));
        Ok(0)
    }
}

/// Calls a function with the file of a handle. virtiofsd gives its files only to the writers of READ requests.
///
/// `PassthroughFs::read()` holds a reference to the handle while it calls the writer, and drops the reference after the
/// writer has returned.
pub fn with_file<T>(
    fs: &impl FileSystem<Inode = Inode, Handle = Handle>,
    ctx: Context,
    inode: Inode,
    handle: Handle,
    call: impl FnOnce(&File) -> io::Result<T>,
) -> io::Result<T> {
    let mut result = None;
    fs.read(ctx, inode, handle, Caller { call: Some(call), result: &mut result }, 0, 0, None, 0)?;
    result.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EBADF)))
}

/// Calls `release`, which removes a handle. The handle's file is closed after the call, without a lock.
pub fn while_open(
    fs: &impl FileSystem<Inode = Inode, Handle = Handle>,
    ctx: Context,
    inode: Inode,
    handle: Handle,
    release: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    with_file(fs, ctx, inode, handle, |_| release())
}

/// Opens a file once more, so that the host's file system does not have to free the file when the node's O_PATH fd is
/// closed. Makes no request to a server: a file that is opened with O_PATH is not opened at the file system. Therefore,
/// the guest can drop its cache while the server of a network file system is gone. The exception is an NFS file without
/// a name, for which the kernel asks the server when the path in /proc is followed (`nfs_weak_revalidate()`).
///
/// Returns `None` if no fd is free, or if the file is neither a regular file nor a directory. virtiofsd opens no other
/// files.
pub fn keep_open(fs: &impl FileSystem<Inode = Inode, Handle = Handle>, ctx: Context, inode: Inode) -> Option<Handle> {
    fs.open(ctx, inode, false, libc::O_PATH.cast_unsigned()).ok()?.0
}

/// Closes a handle that the guest does not know.
pub fn close(fs: &impl FileSystem<Inode = Inode, Handle = Handle>, ctx: Context, inode: Inode, handle: Handle) {
    // The call fails only if the guest has released the handle, whose number it can guess.
    let _ = while_open(fs, ctx, inode, handle, || fs.release(ctx, inode, 0, handle, false, false, None));
}
