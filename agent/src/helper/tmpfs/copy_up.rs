//! Copies a directory of a container's image into a tmpfs.
//!
//! The image is untrusted. This module follows no symbolic link of the image, and opens only regular files for reading.
//! The depth of a directory tree affects neither the stack size nor the number of open fds.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_base::sys::xattr;
use nix::Error as Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::libc;
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

/// Reason why copying a directory failed. Each variant contains the path of the file for which the copy failed,
/// relative to the directory.
#[derive(Debug, thiserror::Error)]
pub enum CopyUpError {
    /// Failed to read a file or directory of the image.
    #[error("failed to read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// Failed to create a file in the tmpfs. The tmpfs may be full.
    #[error("failed to create {}", .0.display())]
    Create(PathBuf, #[source] io::Error),
    /// Failed to copy a file's content. The tmpfs may be full.
    #[error("failed to copy {}", .0.display())]
    Copy(PathBuf, #[source] io::Error),
    /// Failed to set a file's owner or mode.
    #[error("failed to set owner and mode of {}", .0.display())]
    Owner(PathBuf, #[source] Errno),
    /// Failed to copy a file's extended attributes.
    #[error("failed to copy the extended attributes of {}", .0.display())]
    Attributes(PathBuf, #[source] io::Error),
}

/// Copies the tree below the directory `from` into the empty directory `to`, which no other process can access. Keeps
/// content, owners, modes, symbolic links, device nodes and extended attributes.
///
/// # Errors
/// After an error, `to` may contain a part of the tree.
pub fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), CopyUpError> {
    let mut pending = vec![PathBuf::from(".")];
    // Each directory is opened by its path from the top. Therefore PATH_MAX limits the depth of the tree.
    while let Some(path) = pending.pop() {
        let read_error = |error| CopyUpError::Read(path.clone(), error);
        let source = open_beneath(from, &path).map_err(read_error)?;
        let target = open_beneath(to, &path).map_err(|error| CopyUpError::Create(path.clone(), error))?;
        for entry in fs::read_dir(proc_path(source.as_fd())).map_err(read_error)? {
            let name = entry.map_err(read_error)?.file_name();
            let path = path.join(&name);
            if copy(source.as_fd(), target.as_fd(), &name, &path)? {
                pending.push(path);
            }
        }
    }
    Ok(())
}

fn open_beneath(top: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(top, path, how)?)
}

/// Returns the procfs path of an open file. This path stays valid even if the file's name is removed or replaced.
pub(super) fn proc_path(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Copies one directory entry. Returns true if the entry is a directory. The caller then has to copy the directory's
/// entries.
fn copy(source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<bool, CopyUpError> {
    let read_error = |error: io::Error| CopyUpError::Read(path.to_owned(), error);
    let create_error = |error: Errno| CopyUpError::Create(path.to_owned(), error.into());
    let owner_error = |error: Errno| CopyUpError::Owner(path.to_owned(), error);
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let object = openat(source, name, flags, Mode::empty()).map_err(|error| read_error(error.into()))?;
    let status = fstat(&object).map_err(|error| read_error(error.into()))?;
    let kind = SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits());
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    match kind {
        SFlag::S_IFDIR => mkdirat(target, name, private | Mode::S_IXUSR).map_err(create_error)?,
        SFlag::S_IFLNK => {
            let link = readlinkat(&object, "").map_err(|error| read_error(error.into()))?;
            symlinkat(link.as_os_str(), target, name).map_err(create_error)?;
        }
        SFlag::S_IFREG => {
            let mut content = File::open(proc_path(object.as_fd())).map_err(read_error)?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let created = openat(target, name, flags, private).map_err(create_error)?;
            io::copy(&mut content, &mut File::from(created))
                .map_err(|error| CopyUpError::Copy(path.to_owned(), error))?;
        }
        _ => mknodat(target, name, kind, private, status.st_rdev).map_err(create_error)?,
    }
    set_owner_and_mode(target, name, kind, &status).map_err(owner_error)?;
    // Attributes are copied after the owner is set, because changing the owner removes file capabilities.
    copy_xattrs(object.as_fd(), target, name).map_err(|error| CopyUpError::Attributes(path.to_owned(), error))?;
    Ok(kind == SFlag::S_IFDIR)
}

/// Sets the owner first and then the mode, because changing the owner clears the set-user-ID bit.
fn set_owner_and_mode(target: BorrowedFd<'_>, name: &OsStr, kind: SFlag, status: &FileStat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    fchownat(target, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        // FollowSymlink is safe, because `name` is in a private directory and this code has not created a symbolic link
        // of that name.
        let mode = Mode::from_bits_truncate(status.st_mode & 0o7777);
        fchmodat(target, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

/// Copies the extended attributes that [`is_copied`] selects and that the tmpfs supports.
fn copy_xattrs(object: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let from = proc_path(object);
    let names = if_supported(xattr::list(&from))?;
    let Some(names) = names.filter(|names| !names.is_empty()) else { return Ok(()) };
    let to = proc_path(target).join(name);
    let mut value = vec![0_u8; xattr::MAX_SIZE];
    for attribute in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if !is_copied(attribute) {
            continue;
        }
        let attribute = CString::new(attribute)?;
        let length = if_supported(xattr::get(&from, &attribute, &mut value))?;
        let Some(content) = length.and_then(|length| value.get(..length)) else { continue };
        if_supported(xattr::set(&to, &attribute, content))?;
    }
    Ok(())
}

/// Whether an extended attribute is copied. Security labels are not copied, because the guest's security module
/// assigns them. `trusted` attributes are not copied, because they describe the image's layers.
fn is_copied(attribute: &[u8]) -> bool {
    attribute == b"security.capability"
        || attribute.starts_with(b"user.")
        || attribute.starts_with(b"system.posix_acl_")
}

/// Returns `None` if the file system does not support the attribute, or if the attribute does not exist.
fn if_supported<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTSUP | libc::ENODATA)) => Ok(None),
        Err(error) => Err(error),
    }
}
