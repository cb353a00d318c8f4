//! Looks at a volume: its directories and files, then its links, in pieces that fit a message.

use std::ffi::OsStr;
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
/// When something cannot be read, or changed meanwhile ([`io::ErrorKind::Interrupted`]). No link was handed over then.
pub fn walk(volume: &Path, send: impl FnMut(Vec<MirrorEntry>) -> bool) -> io::Result<()> {
    let mut walk = Walk { volume, send, batch: Vec::new(), weight: 0, links: Vec::new(), versions: Vec::new() };
    walk.directory(Path::new(""), 0)?;
    // The kubelet publishes by a link to a new directory, and takes the old one away only then: what was seen is whole
    // if the links still are what they were before the directories were read.
    let unchanged = |link: &MirrorEntry| {
        let path = volume.join(OsStr::from_bytes(&link.path));
        fs::read_link(path).is_ok_and(|now| now.as_os_str().as_bytes() == link.content)
    };
    if !walk.links.iter().all(unchanged) || walk.versions.iter().any(|version| !version.exists()) {
        return Err(io::ErrorKind::Interrupted.into());
    }
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
    /// What links beside them point to.
    versions: Vec<PathBuf>,
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
        let all: Vec<(PathBuf, Metadata)> = names
            .iter()
            .map(|name| Ok((name.clone(), fs::symlink_metadata(self.volume.join(name))?)))
            .collect::<io::Result<_>>()?;
        for (name, meta) in all.iter().filter(|(_, meta)| meta.is_symlink()) {
            let target = fs::read_link(self.volume.join(name))?;
            let beside = path.join(&target);
            if target.components().count() == 1 && self.volume.join(&beside).is_dir() {
                // It was made after the directory was listed.
                if !names.contains(&beside) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                self.versions.push(self.volume.join(beside));
            }
            let content = target.into_os_string().into_vec();
            self.links.push(MirrorEntry { content, ..entry(Kind::SYMLINK, name, meta) });
        }
        // Nothing but directories and files is ever in there beside them, and could not be carried over.
        for (name, meta) in &all {
            if meta.is_dir() {
                self.directory(name, depth + 1)?;
            } else if meta.is_file() {
                self.file(name)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> io::Result<()> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut file = File::options().read(true).custom_flags(flags).open(self.volume.join(path))?;
        let meta = file.metadata()?;
        let mut offset = 0;
        loop {
            let mut content = Vec::new();
            (&mut file).take(BATCH as u64).read_to_end(&mut content)?;
            // A full piece may be the last: then an empty one follows.
            let more = content.len() == BATCH;
            let length = content.len() as u64;
            self.add(MirrorEntry { content, more, offset, ..entry(Kind::FILE, path, &meta) })?;
            offset += length;
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
    fn what_changes_meanwhile_is_not_taken_for_whole() {
        let dir = tempfile::tempdir().unwrap();
        let publish = |version: &str| {
            fs::create_dir(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("key"), vec![b'x'; BATCH]).unwrap();
            symlink(version, dir.path().join("..tmp")).unwrap();
            fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
        };
        publish("..1");
        let mut links = 0;
        // The file fills a message: the next version comes while it is being sent.
        let walked = walk(dir.path(), |batch| {
            links += batch.iter().filter(|entry| entry.kind == Kind::SYMLINK.into()).count();
            if !dir.path().join("..2").exists() {
                publish("..2");
                fs::remove_dir_all(dir.path().join("..1")).unwrap();
            }
            true
        });
        assert_eq!(walked.unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert_eq!(links, 0);
        walk(dir.path(), |_| true).unwrap();
    }

    #[test]
    fn nobody_listening_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(walk(dir.path(), |_| false).is_err());
        assert!(walk(&dir.path().join("nowhere"), |_| true).is_err());
    }
}
