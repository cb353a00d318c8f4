//! Writes an image layer as a reproducible tar with fixed times. Files can have any owner, even if xtask does not run
//! as root.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use tar::{Builder, EntryType, Header};

/// Writes a layer's tar.
pub struct Layer<W: Write> {
    tar: Builder<W>,
}

/// Owner and permissions of an entry.
#[derive(Clone, Copy)]
pub struct Owner {
    pub uid: u64,
    pub gid: u64,
    pub mode: u32,
}

impl Owner {
    /// Returns root as the owner.
    pub fn root(mode: u32) -> Self {
        Self { uid: 0, gid: 0, mode }
    }

    /// Returns an ordinary user as the owner. The group has the same number as the user.
    pub fn user(id: u64, mode: u32) -> Self {
        Self { uid: id, gid: id, mode }
    }
}

impl<W: Write> Layer<W> {
    /// Starts a layer that is written to `out`.
    pub fn new(out: W) -> Self {
        Self { tar: Builder::new(out) }
    }

    /// Adds a directory.
    pub fn dir(&mut self, path: &str, owner: Owner) -> Result<()> {
        let mut header = header(EntryType::Directory, owner, 0);
        Ok(self.tar.append_data(&mut header, path, std::io::empty())?)
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, owner: Owner, content: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, owner, content.len() as u64);
        Ok(self.tar.append_data(&mut header, path, content)?)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, Owner::root(0o777), 0);
        Ok(self.tar.append_link(&mut header, path, Path::new(target))?)
    }

    /// Adds a whiteout, which removes `path` of a lower layer (OCI image specification, layer.md).
    pub fn whiteout(&mut self, path: &str) -> Result<()> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.file(&format!("{dir}/.wh.{name}"), Owner::root(0o644), &[])
    }

    /// Ends the tar and returns the writer.
    pub fn finish(self) -> Result<W> {
        Ok(self.tar.into_inner()?)
    }
}

fn header(kind: EntryType, owner: Owner, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(owner.mode);
    header.set_uid(owner.uid);
    header.set_gid(owner.gid);
    header.set_size(size);
    // With a fixed date (2024-01-01), equal inputs give equal layers.
    header.set_mtime(1_704_067_200);
    header
}
