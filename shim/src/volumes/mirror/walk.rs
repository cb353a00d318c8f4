//! Reads a volume's entries in batches that fit into a ttrpc message. Directories and files come before symlinks.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use husk_proto::agent::MirrorEntry;
use husk_proto::agent::mirror_entry::Kind;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::volumes::mirror::Volume;

/// Number of bytes after which a batch is sent, well below ttrpc's message limit of 4 MiB.
const BATCH_BYTES: usize = 1 << 20;
/// Estimated size of an entry without its content and path, in bytes.
const ENTRY_OVERHEAD: usize = 128;
/// Maximum depth of directories. The volumes that the kubelet creates have far fewer levels.
const MAX_DEPTH: usize = 64;

/// Passes all entries of `volume` to `send`, in batches, until `send` returns false. Blocks the calling thread.
///
/// # Errors
/// - If an entry cannot be read.
/// - [`io::ErrorKind::Interrupted`] if the volume changed while it was read.
/// - [`io::ErrorKind::InvalidData`] if the directories are nested too deeply.
/// - [`io::ErrorKind::BrokenPipe`] if `send` returned false.
///
/// If `walk` returns one of the first three errors, `send` has received no symlink.
pub fn walk(volume: &Volume, send: impl FnMut(Vec<MirrorEntry>) -> bool) -> io::Result<()> {
    let mut walk = Walk { volume, send, batch: Vec::new(), batch_bytes: 0, links: Vec::new(), versions: Vec::new() };
    walk.directory(Path::new(""), 0)?;
    // To publish a new version, the kubelet replaces the symlink to the current version's directory. Then, the kubelet
    // removes the old version's directory. The walk reads a directory's symlinks before its subdirectories. Therefore,
    // the entries are consistent if every symlink still has the same target and every version still exists.
    let unchanged = |link: &MirrorEntry| {
        let current = OpenEntry::at(volume, Path::new(OsStr::from_bytes(&link.path))).and_then(|found| found.target());
        current.is_ok_and(|target| target.as_os_str().as_bytes() == link.content)
    };
    if !walk.links.iter().all(unchanged) || walk.versions.iter().any(|version| OpenEntry::at(volume, version).is_err())
    {
        return Err(io::ErrorKind::Interrupted.into());
    }
    // Send symlinks after all other entries, so that the guest has a symlink's new target before the symlink changes.
    for link in std::mem::take(&mut walk.links) {
        walk.add(link)?;
    }
    walk.flush()
}

/// An entry of the volume, opened with O_PATH.
struct OpenEntry {
    file: OwnedFd,
    stat: FileStat,
}

impl OpenEntry {
    fn at(volume: &Volume, path: &Path) -> io::Result<Self> {
        let file = volume.open(path, OFlag::O_PATH)?;
        let stat = fstat(&file)?;
        Ok(Self { file, stat })
    }

    fn is(&self, kind: SFlag) -> bool {
        SFlag::from_bits_truncate(self.stat.st_mode) & SFlag::S_IFMT == kind
    }

    /// Returns the target of a symlink.
    fn target(&self) -> io::Result<PathBuf> {
        Ok(readlinkat(&self.file, "")?.into())
    }
}

struct Walk<'a, F> {
    volume: &'a Volume,
    send: F,
    batch: Vec<MirrorEntry>,
    batch_bytes: usize,
    links: Vec<MirrorEntry>,
    /// Paths of directories that are the target of a symlink in their parent directory. The paths are relative to the
    /// volume. For example, the kubelet's symlink `..data` points to the directory of the current version.
    versions: Vec<PathBuf>,
}

impl<F: FnMut(Vec<MirrorEntry>) -> bool> Walk<'_, F> {
    fn directory(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            let message = format!("the directories at {} are nested too deeply", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let directory = self.volume.open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        self.add(entry(Kind::DIRECTORY, path, &fstat(&directory)?))?;
        let listed = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        let mut names: Vec<PathBuf> =
            listed.map(|entry| Ok(path.join(entry?.file_name()))).collect::<io::Result<_>>()?;
        names.sort();
        let all: Vec<(&PathBuf, OpenEntry)> =
            names.iter().map(|name| Ok((name, OpenEntry::at(self.volume, name)?))).collect::<io::Result<_>>()?;
        for (name, found) in all.iter().filter(|(_, found)| found.is(SFlag::S_IFLNK)) {
            let target = found.target()?;
            let beside = path.join(&target);
            let is_version = target.components().count() == 1
                && OpenEntry::at(self.volume, &beside).is_ok_and(|found| found.is(SFlag::S_IFDIR));
            if is_version {
                // If the list of names lacks the version, the kubelet created the version after the list was read.
                if !names.contains(&beside) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                self.versions.push(beside);
            }
            let content = target.into_os_string().into_vec();
            self.links.push(MirrorEntry { content, ..entry(Kind::SYMLINK, name, &found.stat) });
        }
        // Skip other file types, which the kubelet does not create.
        for (name, found) in &all {
            if found.is(SFlag::S_IFDIR) {
                self.directory(name, depth + 1)?;
            } else if found.is(SFlag::S_IFREG) {
                self.file(name)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> io::Result<()> {
        let mut file = File::from(self.volume.open(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
        let stat = fstat(&file)?;
        let mut offset = 0;
        loop {
            let mut content = Vec::new();
            (&mut file).take(BATCH_BYTES as u64).read_to_end(&mut content)?;
            // If the last chunk is full, an empty chunk follows.
            let more = content.len() == BATCH_BYTES;
            let length = content.len() as u64;
            self.add(MirrorEntry { content, more, offset, ..entry(Kind::FILE, path, &stat) })?;
            offset += length;
            if !more {
                return Ok(());
            }
        }
    }

    fn add(&mut self, entry: MirrorEntry) -> io::Result<()> {
        self.batch_bytes += entry.content.len() + entry.path.len() + ENTRY_OVERHEAD;
        self.batch.push(entry);
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() || (self.send)(batch) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }
}

fn entry(kind: Kind, path: &Path, stat: &FileStat) -> MirrorEntry {
    MirrorEntry {
        kind: kind.into(),
        path: path.as_os_str().as_bytes().to_vec(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_ns: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host_view::HostView;

    fn volume(path: &Path) -> Volume {
        let host = HostView::own();
        Volume::new(&host.open(path, true).unwrap(), path.to_owned(), &host).unwrap()
    }

    fn walked(path: &Path) -> Vec<MirrorEntry> {
        let mut all = Vec::new();
        walk(&volume(path), |batch| {
            all.extend(batch);
            true
        })
        .unwrap();
        all
    }

    #[test]
    fn walk_sends_parents_first_and_symlinks_last() {
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
    fn walk_sends_large_files_in_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..2 * BATCH_BYTES).map(|i| i as u8).collect();
        fs::write(dir.path().join("f"), &content).unwrap();
        let all = walked(dir.path());
        let chunks: Vec<_> = all.iter().filter(|entry| entry.path == b"f").collect();
        assert_eq!(chunks.iter().map(|chunk| chunk.more).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(chunks.iter().flat_map(|chunk| chunk.content.clone()).collect::<Vec<_>>(), content);
    }

    #[test]
    fn walk_sends_no_symlink_if_the_volume_changes() {
        let dir = tempfile::tempdir().unwrap();
        let publish = |version: &str| {
            fs::create_dir(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("key"), vec![b'x'; BATCH_BYTES]).unwrap();
            symlink(version, dir.path().join("..tmp")).unwrap();
            fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
        };
        publish("..1");
        let mut links = 0;
        // The file `key` fills the first batch. Therefore, this closure publishes version `..2` before the walk ends.
        let walked = walk(&volume(dir.path()), |batch| {
            links += batch.iter().filter(|entry| entry.kind == Kind::SYMLINK.into()).count();
            if !dir.path().join("..2").exists() {
                publish("..2");
                fs::remove_dir_all(dir.path().join("..1")).unwrap();
            }
            true
        });
        assert_eq!(walked.unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert_eq!(links, 0);
        walk(&volume(dir.path()), |_| true).unwrap();
    }

    #[test]
    fn walk_fails_if_send_fails_and_accepts_a_removed_volume() {
        let dir = tempfile::tempdir().unwrap();
        assert!(walk(&volume(dir.path()), |_| false).is_err());
        let gone = dir.path().join("gone");
        fs::create_dir(&gone).unwrap();
        let removed = volume(&gone);
        fs::write(gone.join("file"), "").unwrap();
        fs::remove_dir_all(&gone).unwrap();
        assert!(!removed.exists() && walk(&removed, |_| true).is_ok_and(|()| true));
    }

    #[test]
    fn walk_rejects_directories_that_are_nested_too_deeply() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("z/".repeat(MAX_DEPTH))).unwrap();
        walk(&volume(dir.path()), |_| true).unwrap();
        fs::create_dir_all(dir.path().join("z/".repeat(MAX_DEPTH + 1))).unwrap();
        let error = walk(&volume(dir.path()), |_| true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().ends_with("are nested too deeply"), "{error}");
    }

    #[test]
    fn walk_stays_in_the_directory_that_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, path) = (dir.path().join("outside"), dir.path().join("pods/volume"));
        fs::create_dir_all(outside.join("volume")).unwrap();
        fs::write(outside.join("volume/secret"), "").unwrap();
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("key"), "").unwrap();
        symlink(outside.join("volume"), path.join("link")).unwrap();
        let volume = volume(&path);
        // Replace the parent directory with a symlink, so that the volume's path leads to `outside/volume`.
        fs::rename(dir.path().join("pods"), dir.path().join("moved")).unwrap();
        symlink(&outside, dir.path().join("pods")).unwrap();
        assert!(path.join("secret").exists());
        let mut paths = Vec::new();
        walk(&volume, |batch| {
            paths.extend(batch.into_iter().map(|entry| String::from_utf8(entry.path).unwrap()));
            true
        })
        .unwrap();
        assert_eq!(paths, ["", "key", "link"]);
        assert!(volume.open(Path::new("link/secret"), OFlag::O_PATH).is_err());
        assert!(volume.open(Path::new("../outside"), OFlag::O_PATH).is_err());
    }
}
