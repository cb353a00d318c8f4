//! virtiofsd's file system, but that a hostile request is refused ([`checks`]), that a write that fails half-way says how
//! much it wrote, and that what opens a file sees to it that there is room for it.
//!
//! virtiofsd 1.14 goes on after a short write, to get all of it done, and when the next one fails (a full disk, a quota) it
//! answers with the error alone, though the file has grown (`ZcReader` in its server.rs). write(2) gives the count then, and
//! programs rely on it: who appends again what he takes for not written has part of it twice.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::PassthroughFs;

use super::checks;
use super::fd_limit::FdLimit;

/// The number of a node.
pub type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;
type Opened = (Option<Handle>, OpenOptions);

/// The file system. Clones are the same one.
#[derive(Clone)]
pub struct CheckedFs {
    fs: Arc<PassthroughFs>,
    room: Arc<FdLimit>,
    /// Takes whatever is written to it: /dev/null.
    nowhere: Arc<File>,
}

impl CheckedFs {
    /// # Errors
    /// When there is no /dev/null.
    pub fn new(fs: PassthroughFs, room: FdLimit) -> io::Result<Self> {
        let nowhere = File::options().write(true).open("/dev/null")?;
        Ok(Self { fs: Arc::new(fs), room: Arc::new(room), nowhere: Arc::new(nowhere) })
    }

    /// Before a request that may open a file.
    fn opening(&self) {
        self.room.take();
    }
}

/// What a request brings to be written.
struct Counting<'a, R> {
    inner: R,
    nowhere: &'a File,
}

impl<R: ZeroCopyReader> ZeroCopyReader for Counting<'_, R> {
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
        // What is still there to be read was not written; it goes nowhere, and the answer is how much it was.
        let left = self.inner.write_to_file_at(self.nowhere, count, 0, None)?;
        match count.checked_sub(left) {
            Some(written) if written > 0 => Ok(written),
            _ => Err(error),
        }
    }
}

/// The type that an argument's kind stands for; any other kind is itself one.
///
/// `&CStr` is no kind, so a method that takes one has to say whether it is a name. If it is, `checked` sees to it.
macro_rules! kind {
    // The name of a directory entry.
    (Name) => { &CStr };
    // A string that no system call takes for a path to follow: a symlink's target, the name of an attribute.
    (Text) => { &CStr };
    (Bytes) => { &[u8] };
    // Those of open(2).
    (OpenFlags) => { u32 };
    ($kind:ident $(<$of:ident>)?) => { $kind$(<$of>)? };
}

/// Refuses a request for an argument of it.
macro_rules! checked {
    ($argument:ident: Name) => {
        checks::name($argument)?
    };
    ($argument:ident: OpenFlags) => {
        checks::open_flags($argument)?
    };
    ($argument:ident: $kind:ident) => {};
}

/// Methods that pass on what they are called with, once it is checked. Those that begin with `opening` may open a file.
macro_rules! pass_on {
    ($($(#[$opening:ident])? fn $name:ident($($argument:ident: $kind:ident $(<$of:ident>)?),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: kind!($kind $(<$of>)?)),*) -> $result {
            $(checked!($argument: $kind);)*
            $(self.$opening();)?
            self.fs.$name($($argument),*)
        })*
    };
}

impl FileSystem for CheckedFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

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
        checks::offset(offset)?;
        let r = Counting { inner: r, nowhere: &self.nowhere };
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
        checks::offset(offset)?;
        self.fs.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        self.fs.forget(ctx, inode, count);
        self.room.freed();
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Inode, u64)>) {
        self.fs.batch_forget(ctx, requests);
        self.room.freed();
    }

    // All that PassthroughFs has of its own; the rest of the trait's methods say what they say there.
    pass_on! {
        fn init(capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy() -> ();
        fn statfs(ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        #[opening]
        fn lookup(ctx: Context, parent: Inode, name: Name) -> io::Result<Entry>;
        #[opening]
        fn opendir(ctx: Context, inode: Inode, flags: OpenFlags) -> io::Result<Opened>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        #[opening]
        fn mkdir(
            ctx: Context, parent: Inode, name: Name, mode: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        fn rmdir(ctx: Context, parent: Inode, name: Name) -> io::Result<()>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        #[opening]
        fn open(ctx: Context, inode: Inode, kill_priv: bool, flags: OpenFlags) -> io::Result<Opened>;
        fn release(
            ctx: Context, inode: Inode, flags: u32, handle: Handle, flush: bool, flock_release: bool,
            lock_owner: Option<u64>
        ) -> io::Result<()>;
        #[opening]
        fn create(
            ctx: Context, parent: Inode, name: Name, mode: u32, kill_priv: bool, flags: OpenFlags, umask: u32,
            extensions: Extensions
        ) -> io::Result<(Entry, Option<Handle>, OpenOptions)>;
        fn unlink(ctx: Context, parent: Inode, name: Name) -> io::Result<()>;
        fn getattr(ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(
            ctx: Context, inode: Inode, attr: SetattrIn, handle: Option<Handle>, valid: SetattrValid
        ) -> io::Result<(Attr, Duration)>;
        fn rename(
            ctx: Context, olddir: Inode, oldname: Name, newdir: Inode, newname: Name, flags: u32
        ) -> io::Result<()>;
        #[opening]
        fn mknod(
            ctx: Context, inode: Inode, name: Name, mode: u32, rdev: u32, umask: u32, extensions: Extensions
        ) -> io::Result<Entry>;
        #[opening]
        fn link(ctx: Context, inode: Inode, newparent: Inode, newname: Name) -> io::Result<Entry>;
        #[opening]
        fn symlink(
            ctx: Context, linkname: Text, parent: Inode, name: Name, extensions: Extensions
        ) -> io::Result<Entry>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn flush(ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn setxattr(
            ctx: Context, inode: Inode, name: Text, value: Bytes, flags: u32, extra_flags: SetxattrFlags
        ) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Inode, name: Text, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Inode, name: Text) -> io::Result<()>;
        fn fallocate(
            ctx: Context, inode: Inode, handle: Handle, mode: u32, offset: u64, length: u64
        ) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(
            ctx: Context, inode_in: Inode, handle_in: Handle, offset_in: u64, inode_out: Inode, handle_out: Handle,
            offset_out: u64, len: u64, flags: u64
        ) -> io::Result<usize>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    /// As virtiofsd's: goes on after a short write. A file ends at `room`.
    struct Looping<'a> {
        data: &'a [u8],
        room: u64,
    }

    impl ZeroCopyReader for Looping<'_> {
        fn write_to_file_at(
            &mut self,
            file: &File,
            count: usize,
            offset: u64,
            _flags: Option<WritevFlags>,
        ) -> io::Result<usize> {
            let all = self.data.get(..count.min(self.data.len())).unwrap_or(self.data);
            // Nothing limits what goes nowhere.
            let room = if file.metadata()?.is_file() { self.room.saturating_sub(offset) } else { u64::MAX };
            let fits = all.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (now, rest) = self.data.split_at(fits);
            file.write_all_at(now, offset)?;
            self.data = rest;
            if fits < all.len() { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(fits) }
        }
    }

    #[test]
    fn what_was_written_before_the_end_of_space_is_told() {
        let nowhere = File::options().write(true).open("/dev/null").unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let write = |data: &[u8], room, offset| {
            let mut reader = Counting { inner: Looping { data, room }, nowhere: &nowhere };
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
