//! The file system of a share: virtiofsd's file system, and the files without a name ([`tmpfile`](super::tmpfile)).
//!
//! Requests for the node of a temporary file go to [`TemporaryFiles`], and all others to virtiofsd.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::time::Duration;

use nix::fcntl::copy_file_range;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::credentials::drop_effective_cap;

use super::closing;
use super::ids::{Handle, Inode};
use super::tmpfile::{Relative, TemporaryFiles, is_temporary};

type Opened = (Option<Handle>, OpenOptions);

/// The file system of a share.
pub struct ShareFs {
    passthrough: PassthroughFs,
    temporary: TemporaryFiles,
}

impl ShareFs {
    /// Creates the file system from its two parts.
    pub fn new(passthrough: PassthroughFs, temporary: TemporaryFiles) -> Self {
        Self { passthrough, temporary }
    }

    /// Returns a node on the file system of a temporary file.
    pub fn relative_of_temporary(&self, inode: Inode) -> io::Result<Relative> {
        self.temporary.relative(inode)
    }

    /// Creates a file without a name (TMPFILE) in a directory, whose guest's node is `parent`.
    pub fn create_temporary(
        &self,
        ctx: Context,
        (directory, parent): (Inode, Inode),
        mode: u32,
        flags: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle)> {
        self.with_directory(ctx, directory, |directory| {
            self.temporary.create(ctx, parent, directory, mode, flags, umask)
        })
    }

    /// Calls a function with the file of a handle.
    pub fn with_file<T>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        call: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        closing::with_file(self, ctx, inode, handle, call)
    }

    /// Calls a function with an O_PATH fd of a directory. This fd needs no read permission, and no request to a server.
    fn with_directory<T>(
        &self,
        ctx: Context,
        inode: Inode,
        call: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let flags = (libc::O_PATH | libc::O_DIRECTORY).cast_unsigned();
        let handle = self.passthrough.opendir(ctx, inode, flags)?.0.ok_or(io::ErrorKind::NotADirectory)?;
        let result = self.with_file(ctx, inode, handle, call);
        closing::close(&self.passthrough, ctx, inode, handle);
        result
    }

    /// Gives a temporary file a name.
    fn link_temporary(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        let node = self.temporary.node(inode)?;
        self.with_directory(ctx, newparent, |directory| self.temporary.link(&node, directory, newname))?;
        // If another process has already renamed or removed the file, the guest finds out when it looks the name up.
        if let Ok(found) = self.passthrough.lookup(ctx, newparent, newname) {
            let open = closing::keep_open(&self.passthrough, ctx, found.inode);
            let is = |handle| self.with_file(ctx, found.inode, handle, |file| node.is(file));
            let is_same = open.is_some_and(|handle| is(handle).unwrap_or(false));
            if !is_same || !self.temporary.set_alias(inode, found.inode) {
                self.passthrough.forget(ctx, found.inode, 1);
            }
            if let Some(handle) = open {
                closing::close(&self.passthrough, ctx, found.inode, handle);
            }
        }
        self.temporary.linked(inode)
    }

    /// Returns the entry of a node that virtiofsd has looked up, with the node by which the guest knows the file.
    fn known(&self, ctx: Context, entry: Entry) -> Entry {
        // `_node` keeps the file open. Therefore virtiofsd's node is never the last to be closed.
        let Some((inode, _node)) = self.temporary.by_alias(entry.inode) else { return entry };
        self.passthrough.forget(ctx, entry.inode, 1);
        Entry { inode, ..entry }
    }
}

/// Defines methods that call the same method of the file system that has the node.
macro_rules! dispatch {
    ($(fn $name:ident($ctx:ident: Context, $inode:ident: Inode $(, $argument:ident: $type:ty)*) -> $result:ty;)*) => {
        $(fn $name(&self, $ctx: Context, $inode: Inode $(, $argument: $type)*) -> $result {
            if is_temporary($inode) {
                self.temporary.$name($ctx, $inode $(, $argument)*)
            } else {
                self.passthrough.$name($ctx, $inode $(, $argument)*)
            }
        })*
    };
}

/// Defines methods that call the same method of virtiofsd's file system. It rejects the nodes of temporary files with
/// EBADF. The guest sends these requests only for directories and other types of files.
macro_rules! forward {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> $result {
            self.passthrough.$name($($argument),*)
        })*
    };
}

impl FileSystem for ShareFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let enabled = self.passthrough.init(capable)?;
        self.temporary.init(enabled.contains(FsOptions::POSIX_ACL));
        Ok(enabled)
    }

    fn destroy(&self) {
        self.passthrough.destroy();
        self.temporary.clear();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        Ok(self.known(ctx, self.passthrough.lookup(ctx, parent, name)?))
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
        let created = self.passthrough.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        let (entry, handle, options) = created;
        let alias = entry.inode;
        let entry = self.known(ctx, entry);
        if entry.inode == alias {
            return Ok((entry, handle, options));
        }
        // The name existed. The open file must belong to the node that the guest knows.
        if let Some(handle) = handle {
            closing::close(&self.passthrough, ctx, alias, handle);
        }
        let flags = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC).cast_unsigned();
        match self.temporary.open(ctx, entry.inode, false, flags) {
            Ok((handle, options)) => Ok((entry, handle, options)),
            Err(error) => {
                // The guest does not get the entry, which `known` has counted.
                self.forget(ctx, entry.inode, 1);
                Err(error)
            }
        }
    }

    fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        if is_temporary(inode) {
            return self.link_temporary(ctx, inode, newparent, newname);
        }
        Ok(self.known(ctx, self.passthrough.link(ctx, inode, newparent, newname)?))
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        if !is_temporary(inode) {
            return self.passthrough.forget(ctx, inode, count);
        }
        // `_node` keeps the file open. Therefore virtiofsd's node is not the last to be closed.
        let Some((_node, Some(alias))) = self.temporary.forget(inode, count) else { return };
        self.passthrough.forget(ctx, alias, 1);
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        if !is_temporary(inode) {
            return self.passthrough.read(ctx, inode, handle, w, size, offset, lock_owner, flags);
        }
        let open = self.temporary.open_file(inode, handle)?;
        w.read_from_file_at(open.file(), size as usize, offset, None)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        if !is_temporary(inode) {
            return self.passthrough.write(
                ctx,
                inode,
                handle,
                r,
                size,
                offset,
                lock_owner,
                delayed_write,
                kill_priv,
                flags,
            );
        }
        let open = self.temporary.open_file(inode, handle)?;
        let _without_fsetid = if kill_priv { drop_effective_cap("FSETID")? } else { None };
        let append = !delayed_write && flags.cast_signed() & libc::O_APPEND != 0;
        r.write_to_file_at(open.file(), size as usize, offset, append.then_some(WritevFlags::RWF_APPEND))
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
        if !is_temporary(inode_in) && !is_temporary(inode_out) {
            return self
                .passthrough
                .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags);
        }
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        if flags != 0 {
            return Err(invalid());
        }
        let mut from = i64::try_from(offset_in).map_err(|_| invalid())?;
        let mut to = i64::try_from(offset_out).map_err(|_| invalid())?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // A long copy must not hold virtiofsd's locks of the handles.
        let source = self.with_file(ctx, inode_in, handle_in, File::try_clone)?;
        let target = self.with_file(ctx, inode_out, handle_out, File::try_clone)?;
        Ok(copy_file_range(source, Some(&mut from), target, Some(&mut to), len)?)
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
        if is_temporary(inode) {
            return self.temporary.release(inode, handle);
        }
        self.passthrough.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        self.passthrough.statfs(ctx, inode)
    }

    dispatch! {
        fn open(ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<Opened>;
        fn getattr(ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(
            ctx: Context, inode: Inode, attr: SetattrIn, handle: Option<Handle>, valid: SetattrValid
        ) -> io::Result<(Attr, Duration)>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn flush(ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn fallocate(
            ctx: Context, inode: Inode, handle: Handle, mode: u32, offset: u64, length: u64
        ) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn setxattr(
            ctx: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32, extra_flags: SetxattrFlags
        ) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Inode, name: &CStr) -> io::Result<()>;
    }

    forward! {
        fn opendir(ctx: Context, inode: Inode, flags: u32) -> io::Result<Opened>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn mkdir(
            ctx: Context, parent: Inode, name: &CStr, mode: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        fn mknod(
            ctx: Context, inode: Inode, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        fn symlink(
            ctx: Context, linkname: &CStr, parent: Inode, name: &CStr, extensions: Extensions
        ) -> io::Result<Entry>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rename(
            ctx: Context, olddir: Inode, oldname: &CStr, newdir: Inode, newname: &CStr, flags: u32
        ) -> io::Result<()>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}
