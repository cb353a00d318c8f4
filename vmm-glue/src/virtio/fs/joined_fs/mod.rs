//! Serves each request for a node of the guest with the inner node ([`joins`](super::joins)).
//!
//! An inner node can change when another request finds the file on a better mount. A request that has used the earlier
//! inner node of a file then fails with EBADF, and is repeated. A directory keeps its earlier inner nodes. A request can
//! also fail with EROFS or EXDEV because the guest has not looked the node up since a better mount arrived, and with
//! EACCES because the shim has unmounted the mount of the inner node. This module then looks the node up, as the guest
//! would ([`search`]).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};

use super::closing;
use super::ids::{Handle, Inode};
use super::joins::Surplus;
use super::nodes::{Dropped, Nodes, Place};
use super::share_fs::ShareFs;
use super::tmpfile::{Relative, is_temporary};

/// Maximum number of times that a request is repeated. Each repetition follows a change of an inner node, and a node
/// moves only to better mounts.
const MAX_REPETITIONS: usize = 4;

mod search;

type Opened = (Option<Handle>, OpenOptions);

/// The file system of a share, with the nodes that the guest knows.
pub struct JoinedFs {
    fs: ShareFs,
    nodes: Arc<Nodes>,
    /// The open directory /proc/self/fd.
    fd_directory: File,
    /// Whether the guest has mounted the file system.
    mounted: AtomicBool,
}

impl JoinedFs {
    /// Wraps a file system. `fd_directory` is /proc/self/fd.
    pub fn new(fs: ShareFs, nodes: Arc<Nodes>, fd_directory: File) -> Self {
        Self { fs, nodes, fd_directory, mounted: AtomicBool::new(false) }
    }

    /// Returns whether the guest has mounted the file system, and has not said that it has unmounted it.
    pub fn is_mounted(&self) -> bool {
        self.mounted.load(Ordering::Acquire)
    }

    /// Calls a function with the file of a handle.
    pub fn with_file<T>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        call: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        self.fs.with_file(ctx, self.nodes.inner_of_handle(inode, handle)?, handle, call)
    }

    /// Creates a file without a name (TMPFILE).
    pub fn create_temporary(
        &self,
        ctx: Context,
        parent: Inode,
        mode: u32,
        flags: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle)> {
        let create = |place: Place| self.fs.create_temporary(ctx, (place.inner, parent), mode, flags, umask);
        let (_, (mut entry, handle)) = self.call(ctx, parent, create)?;
        self.nodes.add_unnamed(parent, entry.inode);
        let area = self.nodes.area(parent);
        self.nodes.cache.set_timeouts(area, area, &mut entry);
        Ok((entry, handle))
    }

    /// Calls a function with the place of a node. Repeats the call if the node has moved.
    fn call<T>(&self, ctx: Context, node: Inode, call: impl Fn(Place) -> io::Result<T>) -> io::Result<(Place, T)> {
        let (places, value) = self.call_all(ctx, [node], |[place]| call(place))?;
        let [place] = places;
        Ok((place, value))
    }

    fn call_all<T, const N: usize>(
        &self,
        ctx: Context,
        nodes: [Inode; N],
        call: impl Fn([Place; N]) -> io::Result<T>,
    ) -> io::Result<([Place; N], T)> {
        let mut left = MAX_REPETITIONS;
        loop {
            let places = self.places(nodes)?;
            let error = match call(places) {
                Ok(value) => return Ok((places, value)),
                Err(error) => error,
            };
            if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EXDEV | libc::EACCES)) {
                nodes.iter().for_each(|&node| self.find_again(ctx, node));
            } else if error.raw_os_error() != Some(libc::EBADF) {
                return Err(error);
            }
            left -= 1;
            let inner = |places: [Place; N]| places.map(|place| place.inner);
            if left == 0 || inner(self.places(nodes)?) == inner(places) {
                return Err(error);
            }
        }
    }

    fn places<const N: usize>(&self, nodes: [Inode; N]) -> io::Result<[Place; N]> {
        let mut places = [Place::default(); N];
        for (place, node) in places.iter_mut().zip(nodes) {
            *place = self.nodes.place(node)?;
        }
        Ok(places)
    }

    /// Records an answer with a node, and replaces the node by the one that the guest knows. Returns the inner node.
    fn found(&self, ctx: Context, parent: Inode, place: Place, name: &CStr, entry: &mut Entry) -> Inode {
        let inner = entry.inode;
        if let Some(Surplus { inner, count }) = self.nodes.add(parent, place, name, entry) {
            // The guest's node has another fd of the same file. Therefore, closing this fd frees no file.
            self.fs.forget(ctx, inner, count);
        }
        inner
    }

    fn entry(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        call: impl Fn(Inode) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let (place, mut entry) = self.call(ctx, parent, |place| call(place.inner))?;
        self.found(ctx, parent, place, name, &mut entry);
        Ok(entry)
    }

    fn with_timeout(&self, node: Inode, attr: Attr) -> (Attr, Duration) {
        (attr, self.nodes.cache.attributes(self.nodes.area(node), attr.mode))
    }

    /// Records a handle that was opened with an inner node.
    fn opened(&self, ctx: Context, handle: Option<Handle>, node: Inode, inner: Inode) {
        let Some(handle) = handle.filter(|_| inner != node) else { return };
        self.nodes.opened(handle, node, inner);
        // Before this record, a hostile guest can have closed the handle, whose number it can guess.
        if self.fs.with_file(ctx, inner, handle, |_| Ok(())).is_err() {
            self.nodes.closed(handle);
        }
    }
}

/// Defines methods that call the same method of the file system with the inner node.
macro_rules! by_node {
    ($(fn $name:ident($ctx:ident: Context, $inode:ident: Inode $(, $argument:ident: $type:ty)*) -> $result:ty;)*) => {
        $(fn $name(&self, $ctx: Context, $inode: Inode $(, $argument: $type)*) -> io::Result<$result> {
            let (_, result) = self.call($ctx, $inode, |place| self.fs.$name($ctx, place.inner $(, $argument)*))?;
            Ok(result)
        })*
    };
}

/// Defines methods that call the same method of the file system with the inner node of a handle.
macro_rules! by_handle {
    ($(fn $name:ident($($before:ident: $before_type:ty),*; $inode:ident, $handle:ident
        $(, $argument:ident: $type:ty)*) -> $result:ty;)*) => {
        $(fn $name(
            &self, $($before: $before_type,)* $inode: Inode, $handle: Handle $(, $argument: $type)*
        ) -> io::Result<$result> {
            let inner = self.nodes.inner_of_handle($inode, $handle)?;
            self.fs.$name($($before,)* inner, $handle $(, $argument)*)
        })*
    };
}

impl FileSystem for JoinedFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <ShareFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.mounted.store(true, Ordering::Release);
        self.fs.init(capable)
    }

    fn destroy(&self) {
        self.mounted.store(false, Ordering::Release);
        self.fs.destroy();
        self.nodes.clear();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        let found = self.entry(ctx, parent, name, |parent| self.fs.lookup(ctx, parent, name));
        found.or_else(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => self.nodes.cache.missing(self.nodes.area(parent)).ok_or(error),
            _ => Err(error),
        })
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
        let create =
            |place: Place| self.fs.create(ctx, place.inner, name, mode, kill_priv, flags, umask, extensions.clone());
        let (place, (mut entry, handle, options)) = self.call(ctx, parent, create)?;
        let inner = self.found(ctx, parent, place, name, &mut entry);
        self.opened(ctx, handle, entry.inode, inner);
        Ok((entry, handle, options))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.entry(ctx, parent, name, |parent| self.fs.mkdir(ctx, parent, name, mode, umask, extensions.clone()))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let mknod = |parent| self.fs.mknod(ctx, parent, name, mode, rdev, umask, extensions.clone());
        self.entry(ctx, parent, name, mknod)
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.entry(ctx, parent, name, |parent| self.fs.symlink(ctx, linkname, parent, name, extensions.clone()))
    }

    fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        let link = |[file, parent]: [Place; 2]| self.fs.link(ctx, file.inner, parent.inner, newname);
        let ([_, place], mut entry) = self.call_all(ctx, [inode, newparent], link)?;
        self.found(ctx, newparent, place, newname, &mut entry);
        Ok(entry)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: Inode,
        oldname: &CStr,
        newdir: Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let rename = |[old, new]: [Place; 2]| self.fs.rename(ctx, old.inner, oldname, new.inner, newname, flags);
        self.call_all(ctx, [olddir, newdir], rename).map(|_| ())
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        let Some(Dropped { references, is_last }) = self.nodes.forget(inode, count) else { return };
        // A temporary file is never closed under virtiofsd's lock.
        let current = references.last().map(|current| current.inner).filter(|&inner| is_last && !is_temporary(inner));
        let open = current.and_then(|inner| Some((inner, closing::keep_open(&self.fs, ctx, inner)?)));
        for Surplus { inner, count } in references {
            self.fs.forget(ctx, inner, count);
        }
        if let Some((inner, handle)) = open {
            closing::close(&self.fs, ctx, inner, handle);
        }
    }

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<Opened> {
        let (place, opened) = self.call(ctx, inode, |place| self.fs.open(ctx, place.inner, kill_priv, flags))?;
        self.opened(ctx, opened.0, inode, place.inner);
        Ok(opened)
    }

    fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<Opened> {
        let (place, opened) = self.call(ctx, inode, |place| self.fs.opendir(ctx, place.inner, flags))?;
        self.opened(ctx, opened.0, inode, place.inner);
        Ok(opened)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        let node = match is_temporary(inode).then(|| self.fs.relative_of_temporary(inode)).transpose()? {
            Some(Relative::Alias(inner)) => return self.fs.statfs(ctx, inner),
            Some(Relative::Parent(node)) => node,
            None => inode,
        };
        Ok(self.call(ctx, node, |place| self.fs.statfs(ctx, place.inner))?.1)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let of_handle = handle.map(|handle| self.nodes.inner_of_handle(inode, handle)).transpose()?;
        // virtiofsd reads the attributes after it has changed them. A repetition could truncate a file again.
        let _change = self.nodes.begin_change(inode);
        let (_, result) = self.call(ctx, inode, |place| {
            // virtiofsd needs both the handle and its node. If the node has moved since the guest opened the handle, the
            // file is opened once more.
            let handle = handle.filter(|_| of_handle == Some(place.inner));
            self.fs.setattr(ctx, place.inner, attr, handle, valid)
        })?;
        Ok(self.with_timeout(inode, result.0))
    }

    fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)> {
        let (_, (attr, _)) = self.call(ctx, inode, |place| self.fs.getattr(ctx, place.inner, handle))?;
        Ok(self.with_timeout(inode, attr))
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
        let inner = self.nodes.inner_of_handle(inode, handle)?;
        self.fs.read(ctx, inner, handle, w, size, offset, lock_owner, flags)
    }

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
        let inner = self.nodes.inner_of_handle(inode, handle)?;
        self.fs.write(ctx, inner, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
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
        let from = self.nodes.inner_of_handle(inode_in, handle_in)?;
        let to = self.nodes.inner_of_handle(inode_out, handle_out)?;
        self.fs.copyfilerange(ctx, from, handle_in, offset_in, to, handle_out, offset_out, len, flags)
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
        let inner = self.nodes.inner_of_handle(inode, handle)?;
        self.fs.release(ctx, inner, flags, handle, flush, flock_release, lock_owner)?;
        self.nodes.closed(handle);
        Ok(())
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.fs.releasedir(ctx, self.nodes.inner_of_handle(inode, handle)?, flags, handle)?;
        self.nodes.closed(handle);
        Ok(())
    }

    fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.fs.fsync(ctx, self.nodes.inner_of_handle(inode, handle)?, datasync, handle)
    }

    fn fsyncdir(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.fs.fsyncdir(ctx, self.nodes.inner_of_handle(inode, handle)?, datasync, handle)
    }

    by_handle! {
        fn readdir(ctx: Context; inode, handle, size: u32, offset: u64) -> Self::DirIter;
        fn flush(ctx: Context; inode, handle, lock_owner: u64) -> ();
        fn fallocate(ctx: Context; inode, handle, mode: u32, offset: u64, length: u64) -> ();
        fn lseek(ctx: Context; inode, handle, offset: u64, whence: u32) -> u64;
    }

    by_node! {
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> ();
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> ();
        fn readlink(ctx: Context, inode: Inode) -> Vec<u8>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> ();
        fn setxattr(
            ctx: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32, extra_flags: SetxattrFlags
        ) -> ();
        fn getxattr(ctx: Context, inode: Inode, name: &CStr, size: u32) -> GetxattrReply;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> ListxattrReply;
        fn removexattr(ctx: Context, inode: Inode, name: &CStr) -> ();
        fn syncfs(ctx: Context, inode: Inode) -> ();
    }
}
