//! Copies a directory of a container's image into a tmpfs. The image is hostile: no link in it is followed, nothing but
//! regular files is opened for reading, and its depth costs neither stack nor descriptors.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::Error as Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::libc;
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

/// The longest list of names, and the longest value, that the kernel hands out (xattr(7)).
const XATTR_MAX: usize = 65536;

/// Why a directory cannot be copied: the step, and the path in it.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The image's directory cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// Something cannot be made in the tmpfs; it may be full.
    #[error("cannot make {}", .0.display())]
    Make(PathBuf, #[source] io::Error),
    /// A file's content cannot be copied; the tmpfs may be full.
    #[error("cannot copy {}", .0.display())]
    Copy(PathBuf, #[source] io::Error),
    /// Owner or mode cannot be kept.
    #[error("cannot set owner and mode of {}", .0.display())]
    Owner(PathBuf, #[source] Errno),
    /// Extended attributes cannot be kept.
    #[error("cannot copy extended attributes of {}", .0.display())]
    Attributes(PathBuf, #[source] io::Error),
}

/// Copies everything in the directory `from` into the empty directory `to`, which nobody else can reach: content,
/// owners, modes, links as they are, device nodes, extended attributes.
///
/// # Errors
/// [`FillError`]; `to` holds a part then.
pub fn fill(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), FillError> {
    let mut pending = vec![PathBuf::from(".")];
    // Every directory is opened from the top by its path, of which the kernel limits the length.
    while let Some(path) = pending.pop() {
        let reading = |error| FillError::Read(path.clone(), error);
        let source = beneath(from, &path).map_err(reading)?;
        let target = beneath(to, &path).map_err(|error| FillError::Make(path.clone(), error))?;
        for entry in fs::read_dir(proc_path(source.as_fd())).map_err(reading)? {
            let name = entry.map_err(reading)?.file_name();
            let path = path.join(&name);
            if copy(source.as_fd(), target.as_fd(), &name, &path)? {
                pending.push(path);
            }
        }
    }
    Ok(())
}

fn beneath(top: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(top, path, how)?)
}

/// The path of an open file: opening it opens that file and nothing else, whatever has become of its name.
pub(super) fn proc_path(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Copies one entry; whether it is a directory, whose own entries are still to come.
fn copy(source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<bool, FillError> {
    let reading = |error: io::Error| FillError::Read(path.to_owned(), error);
    let making = |error: Errno| FillError::Make(path.to_owned(), error.into());
    let owning = |error: Errno| FillError::Owner(path.to_owned(), error);
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let object = openat(source, name, flags, Mode::empty()).map_err(|error| reading(error.into()))?;
    let status = fstat(&object).map_err(|error| reading(error.into()))?;
    let kind = SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits());
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    match kind {
        SFlag::S_IFDIR => mkdirat(target, name, private | Mode::S_IXUSR).map_err(making)?,
        SFlag::S_IFLNK => {
            let link = readlinkat(&object, "").map_err(|error| reading(error.into()))?;
            symlinkat(link.as_os_str(), target, name).map_err(making)?;
        }
        SFlag::S_IFREG => {
            let mut content = File::open(proc_path(object.as_fd())).map_err(reading)?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(target, name, flags, private).map_err(making)?;
            io::copy(&mut content, &mut File::from(made)).map_err(|error| FillError::Copy(path.to_owned(), error))?;
        }
        _ => mknodat(target, name, kind, private, status.st_rdev).map_err(making)?,
    }
    own(target, name, kind, &status).map_err(owning)?;
    // After the owner: a change of that takes a file's capabilities away.
    attributes(object.as_fd(), target, name).map_err(|error| FillError::Attributes(path.to_owned(), error))?;
    Ok(kind == SFlag::S_IFDIR)
}

/// Owner first: a change of that takes the set-user-id bit away.
fn own(target: BorrowedFd<'_>, name: &OsStr, kind: SFlag, status: &FileStat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    fchownat(target, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        // No link: it was made a moment ago, as what it is.
        let mode = Mode::from_bits_truncate(status.st_mode & 0o7777);
        fchmodat(target, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

/// Copies the extended attributes that the tmpfs can hold.
fn attributes(object: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let from = CString::new(proc_path(object).as_os_str().as_bytes())?;
    let mut names = vec![0_u8; XATTR_MAX];
    // SAFETY: path and buffer live through the call, and the buffer has the length that is told.
    let length = unsafe { libc::listxattr(from.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let Some(length) = answer(length)?.filter(|length| *length > 0) else { return Ok(()) };
    names.truncate(length);
    let to = CString::new(proc_path(target).join(name).as_os_str().as_bytes())?;
    let mut value = vec![0_u8; XATTR_MAX];
    for attribute in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if !kept(attribute) {
            continue;
        }
        let attribute = CString::new(attribute)?;
        // SAFETY: both strings and the buffer live through the call, and the buffer has the length that is told.
        let length =
            unsafe { libc::getxattr(from.as_ptr(), attribute.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let Some(content) = answer(length)?.and_then(|length| value.get(..length)) else { continue };
        // SAFETY: both strings and the value live through the call, and the value has the length that is told.
        let set =
            unsafe { libc::lsetxattr(to.as_ptr(), attribute.as_ptr(), content.as_ptr().cast(), content.len(), 0) };
        answer(isize::try_from(set).unwrap_or(-1))?;
    }
    Ok(())
}

/// What belongs to a file wherever it lies: labels are the policy's, and `trusted` is the layers' own.
fn kept(attribute: &[u8]) -> bool {
    attribute == b"security.capability"
        || attribute.starts_with(b"user.")
        || attribute.starts_with(b"system.posix_acl_")
}

/// A length, or nothing where attributes are unknown, or this one is, or has just gone.
fn answer(result: isize) -> io::Result<Option<usize>> {
    if let Ok(length) = usize::try_from(result) {
        return Ok(Some(length));
    }
    match Errno::last() {
        Errno::ENOTSUP | Errno::ENODATA => Ok(None),
        error => Err(error.into()),
    }
}
