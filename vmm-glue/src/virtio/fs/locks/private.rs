//! Determines which files only the guest uses. Their locks stay in the guest's kernel, and need no request.
//!
//! The shim makes each mount at a path of two names in the share. The second name says whether the mount is private
//! ([`crate::config::is_private_mount`]). The guest can change neither of these names, because the share itself is
//! read-only. The server reads the path of a file when the guest opens the file.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_base::sync::lock;
use nix::fcntl::readlinkat;

use crate::config::is_private_mount;

/// Reads the paths of files.
pub struct PrivateFiles {
    /// The open directory /proc/self/fd.
    fd_directory: File,
    /// The path of the share. The share is the root directory of a VMM in its jail.
    root: Mutex<PathBuf>,
}

impl PrivateFiles {
    /// Creates a reader of paths. `fd_directory` is /proc/self/fd.
    pub fn new(fd_directory: File) -> Self {
        Self { fd_directory, root: Mutex::new(PathBuf::from("/")) }
    }

    /// Sets the root directory of the share.
    ///
    /// # Errors
    /// The errors of readlink(2).
    pub fn set_root(&self, root: &File) -> io::Result<()> {
        *lock(&self.root) = self.path(root)?;
        Ok(())
    }

    /// Returns whether only the guest uses a file. If the path cannot be read, for example because it is too long,
    /// other pods may use the file.
    pub fn contains(&self, file: &File) -> bool {
        let Ok(path) = self.path(file) else { return false };
        path.strip_prefix(&*lock(&self.root)).ok().and_then(mount_name).is_some_and(is_private_mount)
    }

    fn path(&self, file: &File) -> io::Result<PathBuf> {
        Ok(readlinkat(&self.fd_directory, file.as_raw_fd().to_string().as_str())?.into())
    }
}

/// Returns the name of the mount that contains a file of the share.
fn mount_name(path: &Path) -> Option<&str> {
    let mut names = path.iter();
    let (_, mount, _) = (names.next()?, names.next()?, names.next()?);
    OsStr::to_str(mount)
}
