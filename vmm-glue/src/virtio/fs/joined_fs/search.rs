//! Looks nodes up on a better mount than that of their inner nodes.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, PathBuf};

use nix::fcntl::readlinkat;
use virtiofsd::filesystem::{Context, Entry, FileSystem};

use super::super::closing;
use super::super::ids::Inode;
use super::super::joins::{MountPoint, Origin};
use super::super::nodes::SUBMOUNT;
use super::JoinedFs;

/// Maximum depth of a directory that is looked up again, below the root of its mount.
const MAX_DEPTH: usize = 256;

impl JoinedFs {
    /// If the root of a node's mount has been found on a better mount, or the mount is gone, looks the node up from the
    /// root. Each lookup is one that the guest could make. Best effort: the node does not move if it has another path by
    /// now.
    pub(super) fn find_again(&self, ctx: Context, node: Inode) {
        let Some(Origin { point, root, is_stale }) = self.nodes.origin(node) else { return };
        let Some(is_attached) = self.is_attached(ctx, &point) else { return };
        if !is_attached {
            self.nodes.set_gone(point.mount);
        } else if !is_stale {
            return;
        }
        let Ok(path) = self.path(ctx, node) else { return };
        // The path of a file begins at the root of its mount if the mount is detached.
        let names = path.components().filter(|part| *part != Component::RootDir);
        let above = if is_attached { path.iter().position(|part| part == point.name.as_str()) } else { Some(0) };
        let Some(above) = above else { return };
        let names = names.skip(above);
        let names = names.map(|part| match part {
            Component::Normal(name) => CString::new(name.as_bytes()).ok(),
            _ => None,
        });
        let Some(names) = names.collect::<Option<Vec<_>>>().filter(|names| names.len() <= MAX_DEPTH) else { return };
        let (mut directory, mut found) = (root, Vec::new());
        self.leave_gone_mount(ctx, directory, &mut found);
        for name in &names {
            let Ok(entry) = self.look_up(ctx, directory, name) else { break };
            found.push(entry.inode);
            directory = entry.inode;
            self.leave_gone_mount(ctx, directory, &mut found);
        }
        found.into_iter().rev().for_each(|inode| self.forget(ctx, inode, 1));
    }

    /// Looks a name up without a repetition, which could look up other nodes.
    fn look_up(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        let place = self.nodes.place(parent)?;
        let mut entry = self.fs.lookup(ctx, place.inner, name)?;
        self.found(ctx, parent, place, name, &mut entry);
        Ok(entry)
    }

    /// Returns whether a mount is still at its place in the share, or `None` if this is not known.
    fn is_attached(&self, ctx: Context, point: &MountPoint) -> Option<bool> {
        let name = CString::new(point.name.as_str()).ok()?;
        match self.look_up(ctx, point.directory, &name) {
            Ok(entry) => {
                self.forget(ctx, entry.inode, 1);
                Some(entry.attr.flags & SUBMOUNT != 0)
            }
            Err(error) => (error.raw_os_error() == Some(libc::ENOENT)).then_some(false),
        }
    }

    /// If a node is on a mount that is gone, and is the root of another mount, looks the other mount up. Adds the nodes
    /// to `found`.
    fn leave_gone_mount(&self, ctx: Context, node: Inode, found: &mut Vec<Inode>) {
        let mut tried = None;
        while let Some(MountPoint { mount, directory, name }) = self.nodes.other_mount_of_root(node) {
            if tried == Some(mount) {
                self.nodes.set_gone(mount);
                continue;
            }
            let root = CString::new(name).ok().and_then(|name| self.look_up(ctx, directory, &name).ok());
            found.extend(root.map(|entry| entry.inode));
            tried = Some(mount);
        }
    }

    /// Returns the path of a directory or regular file.
    fn path(&self, ctx: Context, node: Inode) -> io::Result<PathBuf> {
        let inner = self.nodes.place(node)?.inner;
        let handle = closing::keep_open(&self.fs, ctx, inner).ok_or(io::ErrorKind::NotFound)?;
        let path = self.fs.with_file(ctx, inner, handle, |file| {
            Ok(readlinkat(&self.fd_directory, file.as_raw_fd().to_string().as_str())?)
        });
        closing::close(&self.fs, ctx, inner, handle);
        Ok(path?.into())
    }
}
