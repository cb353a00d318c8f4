//! Packs files for the node into a tar. All entries belong to root, and their names are the paths of the files in the
//! node. Symbolic links are kept.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use tar::{Builder, EntryType, Header};

/// Writes a tar file.
pub struct Tar(Builder<BufWriter<File>>);

impl Tar {
    /// Starts a tar file.
    pub fn new(file: File) -> Self {
        Tar(Builder::new(BufWriter::new(file)))
    }

    /// Adds a file, or a directory with its content, at the path `to`.
    pub fn add(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.entry(from, to).with_context(|| format!("failed to pack {}", from.display()))
    }

    fn entry(&mut self, from: &Path, to: &Path) -> Result<()> {
        let metadata = fs::symlink_metadata(from)?;
        let name = to.strip_prefix("/").unwrap_or(to);
        let mut header = header(metadata.permissions().mode() & 0o7777);
        if metadata.is_dir() {
            if !name.as_os_str().is_empty() {
                header.set_entry_type(EntryType::Directory);
                self.0.append_data(&mut header, name, std::io::empty())?;
            }
            let mut entries = fs::read_dir(from)?.collect::<std::io::Result<Vec<_>>>()?;
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                self.entry(&entry.path(), &to.join(entry.file_name()))?;
            }
        } else if metadata.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            self.0.append_link(&mut header, name, fs::read_link(from)?)?;
        } else {
            let mut file = File::open(from)?;
            header.set_size(metadata.len());
            self.0.append_data(&mut header, name, &mut file)?;
        }
        Ok(())
    }

    /// Adds a file with this content.
    pub fn content(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut header = header(0o755);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, name, content).with_context(|| format!("failed to pack {name}"))
    }

    /// Ends the tar file.
    pub fn finish(self) -> Result<()> {
        self.0.into_inner()?.into_inner().map_err(|e| e.into_error())?;
        Ok(())
    }
}

fn header(mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}
