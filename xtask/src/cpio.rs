//! Writes "newc" cpio archives, the format of an initramfs.
//!
//! The kernel's Documentation/driver-api/early-userspace/buffer-format.rst describes the format. Header fields have
//! eight hexadecimal digits each. Name and data are padded to a multiple of four bytes. All entries belong to root and
//! have the modification time 0, so that the same inputs give the same bytes.

use std::io::{self, Write};

/// File types of st_mode.
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// Writes a cpio archive.
pub struct Cpio<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Cpio { out, inode: 0 }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other(format!("{name} is too large for a cpio archive")))?;
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        write!(self.out, "070701")?;
        for field in [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        // The header has 110 bytes. A NUL and padding follow the name.
        self.out.write_all(&[0_u8; 4][..1 + padding(110 + name.len() + 1)])?;
        self.out.write_all(data)?;
        self.out.write_all(&[0_u8; 4][..padding(data.len())])
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, DIRECTORY | mode, (0, 0), &[])
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, (0, 0), data)
    }

    /// Adds a character device.
    pub fn character(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, CHARACTER | mode, (major, minor), &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Returns the number of bytes from `length` to the next multiple of four.
fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn entries_are_padded_to_a_multiple_of_four_bytes() {
        for length in 0..9 {
            let mut cpio = Cpio::new(Vec::new());
            cpio.file(&"n".repeat(length + 1), 0o644, &vec![b'x'; length]).unwrap();
            assert_eq!(cpio.out.len() % 4, 0);
        }
    }

    #[test]
    fn cpio_can_list_the_archive() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.directory("dev", 0o755).unwrap();
        cpio.character("dev/console", 0o600, 5, 1).unwrap();
        cpio.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        let archive = cpio.finish().unwrap();
        let mut child = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let listing = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 3, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" dev"), "{listing}");
        assert!(
            lines[1].starts_with("crw-------") && lines[1].contains("5,") && lines[1].ends_with("dev/console"),
            "{listing}"
        );
        assert!(
            lines[2].starts_with("-rwxr-xr-x") && lines[2].contains(" 10 ") && lines[2].ends_with(" init"),
            "{listing}"
        );
    }
}
