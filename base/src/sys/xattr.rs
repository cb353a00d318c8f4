//! Lists, reads, sets and removes the extended attributes of a file (xattr(7)).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Maximum size, in bytes, of a list of names and of a value that the kernel returns (xattr(7)).
pub const MAX_SIZE: usize = 65536;

/// Returns the names of a file's attributes, each followed by a NUL byte. Follows symbolic links.
///
/// # Errors
/// ENOTSUP if the file system does not support attributes, and the other errors of listxattr(2).
pub fn list(path: &Path) -> io::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut names = vec![0_u8; MAX_SIZE];
    // SAFETY: the path ends with NUL, and `names` has the given length.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
    Ok(names)
}

/// Reads the value of an attribute into `value` and returns the value's length. Follows symbolic links.
///
/// # Errors
/// ENODATA if there is no such attribute, and the other errors of getxattr(2).
pub fn get(path: &Path, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: path and name end with NUL, and `value` has the given length.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// Creates or replaces an attribute. Does not follow a symbolic link at the end of the path.
///
/// # Errors
/// The errors of lsetxattr(2).
pub fn set(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: path and name end with NUL, and `value` has the given length.
    match unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads the names of an open file's attributes into `names`, each followed by a NUL byte. Returns the length of all
/// names. If `names` is empty, only returns this length.
///
/// # Errors
/// ERANGE if `names` is too short, and the other errors of flistxattr(2).
pub fn list_of(file: impl AsFd, names: &mut [u8]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the fd is open, and `names` has the given length.
    let length = unsafe { libc::flistxattr(fd, names.as_mut_ptr().cast(), names.len()) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// Reads the value of an open file's attribute into `value`. Returns the value's length. If `value` is empty, only
/// returns this length.
///
/// # Errors
/// ENODATA if there is no such attribute, ERANGE if `value` is too short, and the other errors of fgetxattr(2).
pub fn get_of(file: impl AsFd, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the fd is open, the name ends with NUL, and `value` has the given length.
    let length = unsafe { libc::fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// Creates or replaces an open file's attribute, with the flags of setxattr(2).
///
/// # Errors
/// The errors of fsetxattr(2).
pub fn set_of(file: impl AsFd, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the fd is open, the name ends with NUL, and `value` has the given length.
    match unsafe { libc::fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), value.len(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes an open file's attribute.
///
/// # Errors
/// ENODATA if there is no such attribute, and the other errors of fremovexattr(2).
pub fn remove_of(file: impl AsFd, name: &CStr) -> io::Result<()> {
    // SAFETY: the fd is open, and the name ends with NUL.
    match unsafe { libc::fremovexattr(file.as_fd().as_raw_fd(), name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no lsetxattr")]
    fn attributes_are_set_listed_and_read() {
        // tmpfs supports user attributes only since Linux 6.6. The file system of the source directory supports them.
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let name = c"user.husk";
        set(file.path(), name, b"a\0b").unwrap();
        assert!(list(file.path()).unwrap().split(|byte| *byte == 0).any(|found| found == name.to_bytes()));
        let mut value = [0; 16];
        let length = get(file.path(), name, &mut value).unwrap();
        assert_eq!(&value[..length], b"a\0b");
        let error = get(file.path(), c"user.none", &mut value).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODATA));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fsetxattr")]
    fn attributes_of_an_open_file_are_set_listed_read_and_removed() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let name = c"user.husk";
        set_of(&file, name, b"a\0b", libc::XATTR_CREATE).unwrap();
        let error = set_of(&file, name, b"c", libc::XATTR_CREATE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        let mut names = vec![0; list_of(&file, &mut []).unwrap()];
        let length = list_of(&file, &mut names).unwrap();
        assert!(names[..length].split(|byte| *byte == 0).any(|found| found == name.to_bytes()));
        let mut value = [0; 3];
        assert_eq!((get_of(&file, name, &mut []).unwrap(), get_of(&file, name, &mut value).unwrap()), (3, 3));
        assert_eq!(&value, b"a\0b");
        assert_eq!(get_of(&file, name, &mut [0; 2]).unwrap_err().raw_os_error(), Some(libc::ERANGE));
        remove_of(&file, name).unwrap();
        assert_eq!(remove_of(&file, name).unwrap_err().raw_os_error(), Some(libc::ENODATA));
    }
}
