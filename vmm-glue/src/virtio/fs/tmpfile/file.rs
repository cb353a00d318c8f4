//! The operations on temporary files. They do the same as virtiofsd's operations on its own nodes and handles.

use std::borrow::Cow;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_base::sys::xattr;
use nix::fcntl::{AtFlags, FallocateFlags, fallocate};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmod, fchmodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, close, dup, fchownat, ftruncate, lseek};
use virtiofsd::filesystem::{Context, GetxattrReply, ListxattrReply};
use virtiofsd::fuse::{Attr, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::passthrough::credentials::drop_effective_cap;
use virtiofsd::passthrough::xattrmap::AppliedRule;
use virtiofsd::soft_idmap::{GuestGid, GuestUid, Id};

use super::super::fd_budget::CountedFile;
use super::super::ids::{Handle, Inode};
use super::{TemporaryFiles, fd_name};

const ACL_ACCESS: &CStr = c"system.posix_acl_access";
const ACL_DEFAULT: &CStr = c"system.posix_acl_default";

/// Returns a file's attributes.
pub fn attributes(file: &File) -> io::Result<Attr> {
    let meta = file.metadata()?;
    Ok(Attr {
        ino: meta.ino(),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: meta.atime().cast_unsigned(),
        mtime: meta.mtime().cast_unsigned(),
        ctime: meta.ctime().cast_unsigned(),
        atimensec: small(meta.atime_nsec()),
        mtimensec: small(meta.mtime_nsec()),
        ctimensec: small(meta.ctime_nsec()),
        mode: meta.mode(),
        nlink: small(meta.nlink()),
        uid: GuestUid::from(meta.uid()),
        gid: GuestGid::from(meta.gid()),
        rdev: 0,
        blksize: small(meta.blksize()),
        flags: 0,
    })
}

/// The file on which SETATTR acts.
enum Target<'a> {
    Open(&'a File),
    Path(&'a CountedFile),
}

fn offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Converts a number to a field of 32 bits. The kernel's numbers fit.
fn small(number: impl TryInto<u32>) -> u32 {
    number.try_into().unwrap_or(u32::MAX)
}

impl TemporaryFiles {
    pub fn getattr(&self, _ctx: Context, inode: Inode, _handle: Option<Handle>) -> io::Result<(Attr, Duration)> {
        Ok((attributes(&self.node(inode)?.path)?, Duration::ZERO))
    }

    pub fn setattr(
        &self,
        _ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let node = self.node(inode)?;
        let open = handle.map(|handle| self.open_file(inode, handle)).transpose()?;
        let target = open.as_ref().map_or(Target::Path(&node.path), |open| Target::Open(open.file()));
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_bits_truncate(attr.mode);
            match target {
                Target::Open(file) => fchmod(file, mode)?,
                Target::Path(path) => self.chmod(path, mode)?,
            }
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(attr.uid.into_inner()));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(attr.gid.into_inner()));
            fchownat(&node.path, c"", uid, gid, AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill_priv = valid.contains(SetattrValid::KILL_SUIDGID);
            let size = offset(attr.size)?;
            let resize = |file: &File| -> io::Result<()> {
                let _without_fsetid = if kill_priv { drop_effective_cap("FSETID")? } else { None };
                Ok(ftruncate(file, size)?)
            };
            match target {
                Target::Open(file) => resize(file)?,
                Target::Path(path) => resize(&*self.reopen(path, libc::O_RDWR | libc::O_NONBLOCK)?)?,
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |now, set, seconds: u64, nanoseconds: u32| match () {
                () if valid.contains(now) => TimeSpec::UTIME_NOW,
                () if valid.contains(set) => TimeSpec::new(seconds.cast_signed(), nanoseconds.into()),
                () => TimeSpec::UTIME_OMIT,
            };
            let atime = time(SetattrValid::ATIME_NOW, SetattrValid::ATIME, attr.atime, attr.atimensec);
            let mtime = time(SetattrValid::MTIME_NOW, SetattrValid::MTIME, attr.mtime, attr.mtimensec);
            let name = fd_name(&node.path);
            utimensat(&self.fd_directory, name.as_str(), &atime, &mtime, UtimensatFlags::FollowSymlink)?;
        }
        Ok((attributes(&node.path)?, Duration::ZERO))
    }

    /// The guest's kernel checks permissions itself (`default_permissions`), and does not send ACCESS.
    pub fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()> {
        let meta = self.node(inode)?.path.metadata()?;
        let mode = meta.permissions().mode();
        let granted = if ctx.uid.is_root() {
            libc::R_OK | libc::W_OK | if mode & 0o111 == 0 { 0 } else { libc::X_OK }
        } else {
            let class = |applies: bool, shift: u32| if applies { mode >> shift } else { 0 };
            let owner = class(meta.uid() == ctx.uid.into_inner(), 6);
            (mode | owner | class(meta.gid() == ctx.gid.into_inner(), 3)).cast_signed()
        };
        let wanted = mask.cast_signed() & (libc::R_OK | libc::W_OK | libc::X_OK);
        if wanted & !granted == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EACCES)) }
    }

    /// close(2) of a duplicate reports errors of earlier writes, as in virtiofsd.
    pub fn flush(&self, _ctx: Context, inode: Inode, handle: Handle, _lock_owner: u64) -> io::Result<()> {
        let open = self.open_file(inode, handle)?;
        Ok(close(dup(open.file())?)?)
    }

    pub fn fsync(&self, _ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        let open = self.open_file(inode, handle)?;
        if datasync { open.file().sync_data() } else { open.file().sync_all() }
    }

    pub fn fallocate(
        &self,
        _ctx: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        start: u64,
        length: u64,
    ) -> io::Result<()> {
        let open = self.open_file(inode, handle)?;
        let mode = FallocateFlags::from_bits_retain(mode.cast_signed());
        Ok(fallocate(open.file(), mode, offset(start)?, offset(length)?)?)
    }

    pub fn lseek(&self, _ctx: Context, inode: Inode, handle: Handle, start: u64, whence: u32) -> io::Result<u64> {
        let open = self.open_file(inode, handle)?;
        let whence = match whence.cast_signed() {
            libc::SEEK_SET => Whence::SeekSet,
            libc::SEEK_CUR => Whence::SeekCur,
            libc::SEEK_END => Whence::SeekEnd,
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        Ok(lseek(open.file(), start.cast_signed(), whence)?.cast_unsigned())
    }

    pub fn setxattr(
        &self,
        _ctx: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let node = self.node(inode)?;
        let host_name = self.xattr_name(name)?;
        let file = self.reopen(&node.path, libc::O_RDONLY | libc::O_NONBLOCK)?;
        if name == ACL_ACCESS && extra_flags.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) {
            fchmod(&*file, Mode::from_bits_truncate(file.metadata()?.mode() & 0o7777) & !Mode::S_ISGID)?;
        }
        xattr::set_of(&*file, &host_name, value, flags.cast_signed())
    }

    pub fn getxattr(&self, _ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let node = self.node(inode)?;
        let name = self.xattr_name(name).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => io::Error::from_raw_os_error(libc::ENODATA),
            _ => error,
        })?;
        let file = self.reopen(&node.path, libc::O_RDONLY | libc::O_NONBLOCK)?;
        let mut value = buffer(size);
        let length = xattr::get_of(&*file, &name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(small(length)));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    pub fn listxattr(&self, _ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        let node = self.node(inode)?;
        let file = self.reopen(&node.path, libc::O_RDONLY | libc::O_NONBLOCK)?;
        let mut names = buffer(size);
        let length = xattr::list_of(&*file, &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(small(length)));
        }
        names.truncate(length);
        let names = self.xattrs.map_server_xattrlist(names).map_err(io::Error::other)?;
        let visible = names.split(|&byte| byte == 0).filter(|name| !name.is_empty() && !self.is_hidden(name));
        Ok(ListxattrReply::Names(visible.flat_map(|name| name.iter().copied().chain([0])).collect()))
    }

    pub fn removexattr(&self, _ctx: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        let node = self.node(inode)?;
        let name = self.xattr_name(name)?;
        xattr::remove_of(&*self.reopen(&node.path, libc::O_RDONLY | libc::O_NONBLOCK)?, &name)
    }

    fn chmod(&self, path: &CountedFile, mode: Mode) -> io::Result<()> {
        Ok(fchmodat(&self.fd_directory, fd_name(path).as_str(), mode, FchmodatFlags::FollowSymlink)?)
    }

    /// Returns whether a guest that does not use POSIX ACLs must not see an attribute.
    fn is_hidden(&self, name: &[u8]) -> bool {
        !self.posix_acl.load(Ordering::Relaxed) && [ACL_ACCESS, ACL_DEFAULT].iter().any(|acl| acl.to_bytes() == name)
    }

    /// Returns the name of an attribute on the host.
    fn xattr_name<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        if self.is_hidden(name.to_bytes()) {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        match self.xattrs.map_client_xattr(name).map_err(io::Error::other)? {
            AppliedRule::Pass(name) => Ok(name),
            AppliedRule::Deny => Err(io::Error::from_raw_os_error(libc::EPERM)),
            AppliedRule::Unsupported => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
        }
    }
}

/// Returns a buffer for an attribute or a list of names. The kernel returns no more than the buffer's maximum size.
fn buffer(size: u32) -> Vec<u8> {
    vec![0; usize::try_from(size).unwrap_or(usize::MAX).min(xattr::MAX_SIZE)]
}
