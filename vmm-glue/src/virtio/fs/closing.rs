//! Closes files of virtiofsd's file system without its locks.
//!
//! close(2) can hang. For example, a network file system writes data back, and a frozen file system cannot free an
//! unlinked file. virtiofsd 1.14 closes a handle while it holds the lock of all handles (`do_release()` in
//! passthrough/mod.rs). It closes the O_PATH fd of a node while it holds the lock of all nodes
//! (`InodeStore::forget_one()`). Every request needs these locks. Therefore, one hanging close(2) would stop the
//! requests for all file systems.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem as _, ZeroCopyWriter};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

use super::ids::{Handle, Inode};

/// A writer that reads nothing, and calls a function instead.
struct Caller<F> {
    call: Option<F>,
    result: Option<io::Result<()>>,
}

impl<F: FnOnce() -> io::Result<()>> ZeroCopyWriter for Caller<F> {
    fn read_from_file_at(&mut self, _: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        self.result = self.call.take().map(|call| call());
        Ok(0)
    }
}

/// Calls `release`, which removes a handle. The handle's file is closed after the call, without a lock.
///
/// `PassthroughFs::read()` holds a reference to the handle while it calls the writer, and drops the reference after the
/// writer has returned.
pub fn while_open(
    fs: &PassthroughFs,
    ctx: Context,
    inode: Inode,
    handle: Handle,
    release: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let mut caller = Caller { call: Some(release), result: None };
    fs.read(ctx, inode, handle, &mut caller, 0, 0, None, 0)?;
    caller.result.unwrap_or(Ok(()))
}

/// Opens an unlinked file, so that the file system does not have to free the file when the node's O_PATH fd is closed.
/// Returns `None` if the file is neither a regular file nor a directory. virtiofsd opens no other files.
pub fn keep_open(fs: &PassthroughFs, ctx: Context, inode: Inode) -> Option<Handle> {
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    fs.open(ctx, inode, false, flags.cast_unsigned()).ok()?.0
}

/// Closes a handle of [`keep_open`].
pub fn close(fs: &PassthroughFs, ctx: Context, inode: Inode, handle: Handle) {
    // The call fails only if the guest has released the handle, whose number it can guess.
    let _ = while_open(fs, ctx, inode, handle, || fs.release(ctx, inode, 0, handle, false, false, None));
}
