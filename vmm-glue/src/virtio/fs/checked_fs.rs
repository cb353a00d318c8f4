//! Wraps virtiofsd's file system. The wrapper rejects hostile requests ([`request_checks`]) and reports short writes.
//! The wrapper also makes requests wait while fds are scarce ([`FdLimit`]), and writes data as the guest's user
//! ([`writer`]), and closes files without virtiofsd's locks ([`closing`]).
//!
//! After a short write, virtiofsd 1.14 writes the rest of the data (`ZcReader` in virtiofsd's server.rs). This second
//! write can fail, for example because the disk is full or a quota is used up. virtiofsd then answers with only the
//! error, although the first write has made the file grow. A local write(2) would return the number of bytes written,
//! and programs rely on this number. If a program appended the data again after the error, the file would contain a
//! part of the data twice.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, InHeader, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::soft_idmap::GuestUid;

use super::fd_limit::FdLimit;
use super::ids::{Handle, Inode};
use super::joined_fs::JoinedFs;
use super::locks::Locks;
use super::nodes::{Job, Nodes, SpaceWait};
use super::tmpfile::is_temporary;
use super::{closing, request_checks, writer};
use crate::virtio::rate_limit::SharedLimiter;

/// Maximum number of bytes that one COPY_FILE_RANGE request copies if the share has a byte rate limit. The tokens for
/// these bytes are taken only after the copy. Therefore, one request can exceed the rate limit by its whole copy, and
/// the copy must not be much larger than the data of a WRITE request. After a short copy, the guest requests the rest.
const MAX_LIMITED_COPY: u64 = 1 << 20;

type Opened = (Option<Handle>, OpenOptions);

/// The wrapped file system. All clones share one state.
#[derive(Clone)]
pub struct CheckedFs {
    fs: Arc<JoinedFs>,
    locks: Arc<Locks>,
    fd_limit: Arc<FdLimit>,
    nodes: Arc<Nodes>,
    dev_null: Arc<File>,
    limiter: SharedLimiter,
}

impl CheckedFs {
    /// Wraps a file system. `dev_null` is /dev/null, opened for writing.
    pub fn new(
        fs: Arc<JoinedFs>,
        locks: Locks,
        fd_limit: FdLimit,
        nodes: Arc<Nodes>,
        dev_null: File,
        limiter: SharedLimiter,
    ) -> Self {
        let (locks, fd_limit) = (Arc::new(locks), Arc::new(fd_limit));
        let dev_null = Arc::new(dev_null);
        Self { fs, locks, fd_limit, nodes, dev_null, limiter }
    }

    /// Returns the nodes that the guest has looked up.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Returns the locks of files.
    pub fn locks(&self) -> &Arc<Locks> {
        &self.locks
    }

    /// Returns the limiter of the requests.
    pub fn limiter(&self) -> &SharedLimiter {
        &self.limiter
    }

    /// Waits for a limited time while fds are scarce. A request that may open a file calls this function first.
    fn wait_for_fd(&self) {
        self.fd_limit.wait_for_fd();
    }

    /// Waits as [`CheckedFs::wait_for_fd`] does. A request that may open the file of a node calls this function first.
    pub fn wait_for_fd_of(&self, inode: Inode) {
        if is_temporary(inode) { self.fd_limit.wait_for_temporary() } else { self.wait_for_fd() }
    }

    /// Creates a file without a name, and opens it (TMPFILE).
    pub fn create_temporary(
        &self,
        ctx: Context,
        parent: Inode,
        mode: u32,
        flags: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle, OpenOptions)> {
        self.fd_limit.wait_for_temporary();
        self.wait_for_space(parent);
        let (entry, handle) = self.fs.create_temporary(ctx, parent, mode, flags, umask)?;
        let options = OpenOptions::KEEP_CACHE | self.nodes.area(entry.inode).open_options();
        Ok((entry, handle, options))
    }

    /// Drops the references of a job.
    pub fn run_job(&self, job: &Job) {
        self.forget(Context::from(InHeader::default()), job.node, job.count);
        self.nodes.end_job(job);
    }

    /// Waits for a limited time until the files that the guest has removed from the node's mount are free. A request
    /// that needs space calls this function first.
    ///
    /// The host frees a removed file when its last fd is closed. A job closes the fd of the VMM. On the host, unlink(2)
    /// returns only when the file is free, and programs rely on it.
    fn wait_for_space(&self, node: Inode) {
        let mut wait = SpaceWait::begin();
        while let Some(job) = self.nodes.take_job_of_mount(node, &mut wait) {
            self.run_job(&job);
        }
        self.nodes.wait_for_jobs(node, &wait);
    }

    /// Returns whether the guest has mounted the file system.
    pub fn is_mounted(&self) -> bool {
        self.fs.is_mounted()
    }

    /// Returns the owner of a file.
    fn owner(&self, ctx: Context, inode: Inode) -> io::Result<GuestUid> {
        Ok(self.fs.getattr(ctx, inode, None)?.0.uid)
    }
}

/// The data of a WRITE request. If an error occurs after a part of the data was written, the reader returns the length
/// of this part instead of the error.
struct CountingReader<'a, R> {
    inner: R,
    dev_null: &'a File,
}

impl<R: ZeroCopyReader> ZeroCopyReader for CountingReader<'_, R> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let error = match self.inner.write_to_file_at(file, count, offset, flags) {
            Ok(written) => return Ok(written),
            Err(error) => error,
        };
        // The reader still contains the bytes that were not written. Count these bytes by writing them to /dev/null.
        let unwritten = self.inner.write_to_file_at(self.dev_null, count, 0, None)?;
        match count.checked_sub(unwritten) {
            Some(written) if written > 0 => Ok(written),
            _ => Err(error),
        }
    }
}

/// Maps the kind of an argument to the argument's type. A kind that is not listed here is itself a type.
///
/// `&CStr` is not a kind. Therefore, each method has to declare a string either as `Name`, which `check` checks, or as
/// `Text`.
macro_rules! kind {
    // Name of a directory entry.
    (Name) => { &CStr };
    // String that no system call resolves as a path, such as the target of a symlink or the name of an extended
    // attribute.
    (Text) => { &CStr };
    (Bytes) => { &[u8] };
    // Flags of open(2).
    (OpenFlags) => { u32 };
    ($kind:ident $(<$of:ident>)?) => { $kind$(<$of>)? };
}

/// Rejects a request if the argument is invalid for its kind.
macro_rules! check {
    ($argument:ident: Name) => {
        request_checks::name($argument)?
    };
    ($argument:ident: OpenFlags) => {
        request_checks::open_flags($argument)?
    };
    ($argument:ident: $kind:ident) => {};
}

/// Calls a method of virtiofsd's file system. A method that is marked `#[wait_for_fd]` may open a file, and therefore
/// first calls [`CheckedFs::wait_for_fd`].
macro_rules! call {
    ($self:ident, [], $call:expr) => {
        $call
    };
    ($self:ident, [wait_for_fd], $call:expr) => {{
        $self.wait_for_fd();
        $call
    }};
}

/// Defines methods that check their arguments and then call the same method of virtiofsd's file system with `call`.
macro_rules! forward {
    (
        $($(#[$mark:ident])?
        fn $name:ident($($argument:ident: $kind:ident $(<$of:ident>)?),*) -> $result:ty;)*
    ) => {
        $(fn $name(&self, $($argument: kind!($kind $(<$of>)?)),*) -> $result {
            $(check!($argument: $kind);)*
            call!(self, [$($mark)?], self.fs.$name($($argument),*))
        })*
    };
}

impl FileSystem for CheckedFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <JoinedFs as FileSystem>::DirIter;

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        request_checks::offset(offset)?;
        self.wait_for_space(inode);
        let r = CountingReader { inner: r, dev_null: &self.dev_null };
        // When the guest kernel writes back dirty pages of a mapped file, the kernel does not know which user changed
        // the pages. Therefore, write these pages as the file's owner.
        let user = if delayed_write { self.owner(ctx, inode)? } else { ctx.uid };
        let _writer = writer::act_as(user)?;
        self.fs.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        request_checks::offset(offset)?;
        self.fs.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        // The limiter does not count the length. The host's file system allocates or zeroes the range by a change of
        // its metadata, and writes no data. The request cannot be answered in parts. Therefore, all tokens of a long
        // range would be due at once, and would stop the pod's other requests for a long time.
        request_checks::fallocate_mode(mode)?;
        self.wait_for_space(inode);
        let _writer = writer::act_as(ctx.uid)?;
        self.fs.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Inode,
        handle_in: Handle,
        offset_in: u64,
        inode_out: Inode,
        handle_out: Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.wait_for_space(inode_out);
        let _writer = writer::act_as(ctx.uid)?;
        let len = if self.limiter.limits_bytes() { len.min(MAX_LIMITED_COPY) } else { len };
        let copied = self
            .fs
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)?;
        // The limiter has counted only the bytes in the request and its answer. The host's kernel copies the file data
        // in addition.
        self.limiter.charge_bytes(copied as u64);
        Ok(copied)
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        self.fs.forget(ctx, inode, count);
        self.fd_limit.released();
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.locks.release(inode, handle);
        // Closing the handle also ends the lock of flock(2).
        let released = closing::while_open(&*self.fs, ctx, inode, handle, || {
            self.fs.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
        });
        self.fd_limit.released();
        released
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        closing::while_open(&*self.fs, ctx, inode, handle, || self.fs.releasedir(ctx, inode, flags, handle))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        request_checks::name(name)?;
        request_checks::open_flags(flags)?;
        self.wait_for_fd();
        self.wait_for_space(parent);
        let (entry, handle, options) = self.fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        let options = options | self.nodes.area(entry.inode).open_options();
        Ok((entry, handle, options))
    }

    /// Rejects a guest kernel that does not support FUSE_SUBMOUNTS, because such a kernel cannot tell mounts apart.
    /// virtiofsd itself would only log a warning. Linux supports FUSE_SUBMOUNTS since 5.10.
    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        let enabled = self.fs.init(capable)?;
        self.locks.clear();
        Ok(enabled | FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS)
    }

    fn destroy(&self) {
        self.fs.destroy();
        self.locks.clear();
    }

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<Opened> {
        request_checks::open_flags(flags)?;
        self.wait_for_fd_of(inode);
        let (handle, options) = self.fs.open(ctx, inode, kill_priv, flags)?;
        Ok((handle, options | self.nodes.area(inode).open_options()))
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        self.locks.flush(inode, lock_owner);
        self.fs.flush(ctx, inode, handle, lock_owner)
    }

    // These are the remaining methods that PassthroughFs implements. The trait's defaults apply to the methods that
    // PassthroughFs does not implement.
    forward! {
        fn statfs(ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        #[wait_for_fd]
        fn lookup(ctx: Context, parent: Inode, name: Name) -> io::Result<Entry>;
        #[wait_for_fd]
        fn opendir(ctx: Context, inode: Inode, flags: OpenFlags) -> io::Result<Opened>;
        #[wait_for_fd]
        fn mkdir(
            ctx: Context, parent: Inode, name: Name, mode: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        fn unlink(ctx: Context, parent: Inode, name: Name) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: Name) -> io::Result<()>;
        fn rename(
            ctx: Context, olddir: Inode, oldname: Name, newdir: Inode, newname: Name, flags: u32
        ) -> io::Result<()>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn getattr(ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(
            ctx: Context, inode: Inode, attr: SetattrIn, handle: Option<Handle>, valid: SetattrValid
        ) -> io::Result<(Attr, Duration)>;
        #[wait_for_fd]
        fn mknod(
            ctx: Context, inode: Inode, name: Name, mode: u32, rdev: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        #[wait_for_fd]
        fn link(ctx: Context, inode: Inode, newparent: Inode, newname: Name) -> io::Result<Entry>;
        #[wait_for_fd]
        fn symlink(
            ctx: Context, linkname: Text, parent: Inode, name: Name, extensions: Extensions
        ) -> io::Result<Entry>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn fsync(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn setxattr(
            ctx: Context, inode: Inode, name: Text, value: Bytes, flags: u32, extra_flags: SetxattrFlags
        ) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Inode, name: Text, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Inode, name: Text) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A reader that continues after a short write, as virtiofsd's reader does. A write to a regular file fails with
    /// ENOSPC if the write would make the file larger than `max_size`.
    struct LoopingReader<'a> {
        data: &'a [u8],
        max_size: u64,
    }

    impl ZeroCopyReader for LoopingReader<'_> {
        fn write_to_file_at(
            &mut self,
            file: &File,
            count: usize,
            offset: u64,
            _flags: Option<WritevFlags>,
        ) -> io::Result<usize> {
            let all = self.data.get(..count.min(self.data.len())).unwrap_or(self.data);
            // /dev/null accepts any amount of data.
            let room = if file.metadata()?.is_file() { self.max_size.saturating_sub(offset) } else { u64::MAX };
            let fits = all.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (written, rest) = self.data.split_at(fits);
            file.write_all_at(written, offset)?;
            self.data = rest;
            if fits < all.len() { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(fits) }
        }
    }

    #[test]
    fn write_that_fills_the_disk_returns_the_number_of_bytes_written() {
        let dev_null = File::options().write(true).open("/dev/null").unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let write = |data: &[u8], max_size, offset| {
            let mut reader = CountingReader { inner: LoopingReader { data, max_size }, dev_null: &dev_null };
            reader.write_to_file_at(&file, data.len(), offset, None).map_err(|error| error.raw_os_error())
        };
        assert_eq!(write(b"all of it", 100, 0), Ok(9));
        assert_eq!(write(b"half of it", 13, 9), Ok(4));
        assert_eq!(write(b"nothing", 13, 13), Err(Some(libc::ENOSPC)));
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all of ithalf");
    }
}
