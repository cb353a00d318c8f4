//! Looks at a volume: its directories and files, then its links, in pieces that fit a message.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use husk_proto::agent::MirrorEntry;
use husk_proto::agent::mirror_entry::Kind;

/// Contents sent in one message, in bytes: well below ttrpc's limit of 4 MiB.
const BATCH: usize = 1 << 20;
/// What an entry weighs beside its content.
const ENTRY: usize = 128;
/// Deeper than any volume of the kubelet's.
const MAX_DEPTH: usize = 64;

/// Hands everything in `volume` to `send`, which says whether to go on; blocks.
///
/// # Errors
/// When something cannot be read, also because it went away meanwhile.
pub fn walk(volume: &Path, send: impl FnMut(Vec<MirrorEntry>) -> bool) -> io::Result<()> {
    let mut walk = Walk { volume, send, batch: Vec::new(), weight: 0, links: Vec::new() };
    walk.directory(Path::new(""), 0)?;
    // Last, so that a link never changes before what it points to is there.
    for link in std::mem::take(&mut walk.links) {
        walk.add(link)?;
    }
    walk.flush()
}

struct Walk<'a, F> {
    volume: &'a Path,
    send: F,
    batch: Vec<MirrorEntry>,
    weight: usize,
    links: Vec<MirrorEntry>,
}

impl<F: FnMut(Vec<MirrorEntry>) -> bool> Walk<'_, F> {
    fn directory(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other(format!("{}: too deep", path.display())));
        }
        let here = self.volume.join(path);
        self.add(entry(Kind::DIRECTORY, path, &fs::symlink_metadata(&here)?))?;
        let mut names: Vec<PathBuf> =
            fs::read_dir(&here)?.map(|entry| Ok(path.join(entry?.file_name()))).collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let meta = fs::symlink_metadata(self.volume.join(&name))?;
            match () {
                () if meta.is_dir() => self.directory(&name, depth + 1)?,
                () if meta.is_file() => self.file(&name)?,
                () if meta.is_symlink() => {
                    let content = fs::read_link(self.volume.join(&name))?.into_os_string().into_vec();
                    self.links.push(MirrorEntry { content, ..entry(Kind::SYMLINK, &name, &meta) });
                }
                // Nothing else is ever in there, and could not be carried over.
                () => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> io::Result<()> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut file = File::options().read(true).custom_flags(flags).open(self.volume.join(path))?;
        let meta = file.metadata()?;
        loop {
            let mut content = Vec::new();
            (&mut file).take(BATCH as u64).read_to_end(&mut content)?;
            // A full piece may be the last: then an empty one follows.
            let more = content.len() == BATCH;
            self.add(MirrorEntry { content, more, ..entry(Kind::FILE, path, &meta) })?;
            if !more {
                return Ok(());
            }
        }
    }

    fn add(&mut self, entry: MirrorEntry) -> io::Result<()> {
        self.weight += entry.content.len() + entry.path.len() + ENTRY;
        self.batch.push(entry);
        if self.weight >= BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.weight = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() || (self.send)(batch) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }
}

fn entry(kind: Kind, path: &Path, meta: &Metadata) -> MirrorEntry {
    MirrorEntry {
        kind: kind.into(),
        path: path.as_os_str().as_bytes().to_vec(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        modified_ns: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn walked(volume: &Path) -> Vec<MirrorEntry> {
        let mut all = Vec::new();
        walk(volume, |batch| {
            all.extend(batch);
            true
        })
        .unwrap();
        all
    }

    #[test]
    fn links_come_last_and_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..1")).unwrap();
        fs::write(dir.path().join("..1/key"), "value").unwrap();
        symlink("..1", dir.path().join("..data")).unwrap();
        symlink("..data/key", dir.path().join("key")).unwrap();
        let all = walked(dir.path());
        let paths: Vec<_> = all.iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect();
        assert_eq!(paths, ["", "..1", "..1/key", "..data", "key"]);
        assert_eq!(all[2].content, b"value");
        assert_eq!(all[4].content, b"..data/key");
    }

    #[test]
    fn large_files_come_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..2 * BATCH).map(|i| i as u8).collect();
        fs::write(dir.path().join("f"), &content).unwrap();
        let all = walked(dir.path());
        let pieces: Vec<_> = all.iter().filter(|entry| entry.path == b"f").collect();
        assert_eq!(pieces.iter().map(|piece| piece.more).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(pieces.iter().flat_map(|piece| piece.content.clone()).collect::<Vec<_>>(), content);
    }

    #[test]
    fn nobody_listening_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(walk(dir.path(), |_| false).is_err());
        assert!(walk(&dir.path().join("nowhere"), |_| true).is_err());
    }
}
