//! Copies of volumes whose changes a container is to notice: what the shim sends is made or replaced here, on a file
//! system of the guest's own, so that inotify(7) tells of it as on any other machine.
//!
//! Whatever is there already and the same is not touched; whatever is new or different is made aside and renamed into
//! place, so that a reader sees the old or the new and nothing between.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use husk_proto::GUEST_MIRRORS;
use husk_proto::agent::mirror_entry::Kind;
use husk_proto::agent::{MirrorEntry, MirrorRequest};

/// The mirrored volumes of all containers.
pub struct Mirrors {
    root: PathBuf,
    /// What the messages of a round that has not ended named, by container and mount.
    rounds: Mutex<HashMap<(String, u32), BTreeSet<PathBuf>>>,
}

impl Default for Mirrors {
    fn default() -> Self {
        Self::at(GUEST_MIRRORS.into())
    }
}

impl Mirrors {
    fn at(root: PathBuf) -> Self {
        Self { root, rounds: Mutex::default() }
    }

    /// Removes the copies of a container's volumes, and what was noted of a round that will not end; that there are none
    /// is fine. Blocks.
    pub fn remove(&self, container: &str) {
        let Ok(name) = plain(OsStr::new(container)) else { return };
        // Held meanwhile: a message that is being applied has an end first.
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.retain(|(of, _), _| of != container);
        let path = self.root.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!("{}: {error}", path.display()),
            _ => {}
        }
    }

    /// Applies one message; blocks.
    ///
    /// # Errors
    /// The path and what the kernel says; what was applied until then stays.
    pub fn apply(&self, request: &MirrorRequest) -> io::Result<()> {
        let container = self.root.join(plain(OsStr::new(&request.container_id))?);
        let (root, aside) =
            (container.join(request.mount.to_string()), container.join(format!("{}.new", request.mount)));
        fs::create_dir_all(&container)?;
        // Nobody but the containers that mount it looks in here, as whatever user they are while they do.
        fs::set_permissions(&self.root, Permissions::from_mode(0o711))?;
        let key = (request.container_id.clone(), request.mount);
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = rounds.entry(key.clone()).or_default();
        for entry in &request.entries {
            let path = relative(OsStr::from_bytes(&entry.path))?;
            if path.as_os_str().is_empty() {
                // Of a round that was given up nothing counts.
                seen.clear();
            }
            put(&root, &path, &aside, entry)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
            seen.insert(path);
        }
        if request.last {
            let seen = rounds.remove(&key).unwrap_or_default();
            prune(&root, Path::new(""), &seen)?;
        }
        Ok(())
    }
}

/// A single ordinary path component.
fn plain(name: &OsStr) -> io::Result<&OsStr> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(part),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// A path that stays below where it starts.
fn relative(path: &OsStr) -> io::Result<PathBuf> {
    let path = Path::new(path);
    match path.components().all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(path.to_path_buf()),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Makes one entry. Its parents are directories, not links: they were entries before it.
fn put(root: &Path, path: &Path, aside: &Path, entry: &MirrorEntry) -> io::Result<()> {
    let mut parent = root.to_path_buf();
    for part in path.parent().into_iter().flat_map(Path::components) {
        if !fs::symlink_metadata(&parent)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        parent.push(part);
    }
    let target = root.join(path);
    let present = fs::symlink_metadata(&target).ok();
    match entry.kind.enum_value_or_default() {
        Kind::DIRECTORY => {
            if !present.as_ref().is_some_and(Metadata::is_dir) {
                clear(&target, present.as_ref())?;
                fs::create_dir(&target)?;
            }
            own(&target, entry)
        }
        Kind::SYMLINK => {
            let link = PathBuf::from(std::ffi::OsString::from_vec(entry.content.clone()));
            if fs::read_link(&target).is_ok_and(|now| now == link) {
                return Ok(());
            }
            if present.as_ref().is_some_and(Metadata::is_dir) {
                clear(&target, present.as_ref())?;
            }
            let _ = fs::remove_file(aside);
            symlink(link, aside)?;
            lchown(aside, Some(entry.uid), Some(entry.gid))?;
            fs::rename(aside, &target)
        }
        Kind::FILE => {
            if entry.offset == 0 && !entry.more && same(&target, present.as_ref(), entry) {
                return Ok(());
            }
            let mut file = piece(aside, entry.offset)?;
            file.write_all(&entry.content)?;
            if entry.more {
                return Ok(());
            }
            own(aside, entry)?;
            let modified = UNIX_EPOCH + Duration::from_nanos(u64::try_from(entry.modified_ns).unwrap_or(0));
            File::set_modified(&file, modified)?;
            if present.as_ref().is_some_and(Metadata::is_dir) {
                clear(&target, present.as_ref())?;
            }
            fs::rename(aside, &target)
        }
    }
}

/// The file aside, to be written from `offset` on: the first piece begins it, whatever an earlier round left there.
fn piece(aside: &Path, offset: u64) -> io::Result<File> {
    if offset > 0 {
        let file = OpenOptions::new().append(true).open(aside)?;
        return if file.metadata()?.len() == offset { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) };
    }
    clear(aside, fs::symlink_metadata(aside).ok().as_ref())?;
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(aside)
}

/// Sets owner and permissions where they differ.
fn own(path: &Path, entry: &MirrorEntry) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if (meta.uid(), meta.gid()) != (entry.uid, entry.gid) {
        chown(path, Some(entry.uid), Some(entry.gid))?;
    }
    // After the owner, whose change takes set-id bits away.
    if fs::symlink_metadata(path)?.mode() & 0o7777 != entry.mode & 0o7777 {
        fs::set_permissions(path, Permissions::from_mode(entry.mode & 0o7777))?;
    }
    Ok(())
}

/// Whether a file is there already, with this owner, mode and content.
fn same(target: &Path, present: Option<&Metadata>, entry: &MirrorEntry) -> bool {
    present.is_some_and(|meta| {
        meta.is_file()
            && (meta.uid(), meta.gid(), meta.mode() & 0o7777) == (entry.uid, entry.gid, entry.mode & 0o7777)
            && meta.len() == entry.content.len() as u64
            && fs::read(target).is_ok_and(|now| now == entry.content)
    })
}

fn clear(path: &Path, present: Option<&Metadata>) -> io::Result<()> {
    match present {
        None => Ok(()),
        Some(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
    }
}

/// Removes what is not in `keep`, which has paths relative to `root`.
fn prune(root: &Path, below: &Path, keep: &BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let directory = entry.file_type()?.is_dir();
        match (keep.contains(&path), directory) {
            (true, true) => prune(root, &path, keep)?,
            (true, false) => {}
            (false, true) => fs::remove_dir_all(root.join(&path))?,
            (false, false) => fs::remove_file(root.join(&path))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(kind: Kind, path: &str, content: &str) -> MirrorEntry {
        // SAFETY: neither call takes arguments.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        let mode = if kind == Kind::DIRECTORY { 0o755 } else { 0o644 };
        MirrorEntry {
            kind: kind.into(),
            path: path.into(),
            mode,
            uid,
            gid,
            content: content.into(),
            ..Default::default()
        }
    }

    fn round(mirrors: &Mirrors, entries: Vec<MirrorEntry>) -> io::Result<()> {
        mirrors.apply(&MirrorRequest { container_id: "c".into(), mount: 3, entries, last: true, ..Default::default() })
    }

    fn projected(version: &str, value: &str) -> Vec<MirrorEntry> {
        vec![
            entry(Kind::DIRECTORY, "", ""),
            entry(Kind::DIRECTORY, version, ""),
            entry(Kind::FILE, &format!("{version}/key"), value),
            entry(Kind::SYMLINK, "..data", version),
            entry(Kind::SYMLINK, "key", "..data/key"),
        ]
    }

    #[test]
    fn a_round_replaces_what_was_before() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        round(&mirrors, projected("..1", "old")).unwrap();
        let volume = dir.path().join("m/c/3");
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "old");
        round(&mirrors, projected("..2", "new")).unwrap();
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "new");
        assert!(!volume.join("..1").exists());
        // What stays the same is not touched.
        let inode = fs::metadata(volume.join("key")).unwrap().ino();
        round(&mirrors, projected("..2", "new")).unwrap();
        assert_eq!(fs::metadata(volume.join("key")).unwrap().ino(), inode);
    }

    #[test]
    fn files_come_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        let piece = MirrorEntry { more: true, ..entry(Kind::FILE, "f", "one ") };
        let rest = MirrorEntry { offset: 4, ..entry(Kind::FILE, "f", "two") };
        round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), piece, rest.clone()]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("m/c/3/f")).unwrap(), "one two");
        assert!(round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), rest]).is_err(), "a rest without a beginning");
    }

    #[test]
    fn of_a_round_that_was_given_up_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        let piece = MirrorEntry { more: true, ..entry(Kind::FILE, "..1/large", "half of it") };
        let begun = vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::DIRECTORY, "..1", ""), piece];
        let request = MirrorRequest { container_id: "c".into(), mount: 3, entries: begun, ..Default::default() };
        mirrors.apply(&request).unwrap();
        round(&mirrors, projected("..2", "new")).unwrap();
        let volume = dir.path().join("m/c/3");
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "new");
        assert!(!volume.join("..1").exists());
    }

    #[test]
    fn a_container_that_goes_takes_its_copies_along() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::FILE, "a", "1")]).unwrap();
        let entries = vec![entry(Kind::DIRECTORY, "", "")];
        let request = MirrorRequest { container_id: "c".into(), mount: 8, entries, ..Default::default() };
        mirrors.apply(&request).unwrap();
        mirrors.remove("no-such");
        mirrors.remove("..");
        assert!(dir.path().join("m/c/8").exists());
        mirrors.remove("c");
        assert!(!dir.path().join("m/c").exists());
        assert!(mirrors.rounds.lock().unwrap().is_empty());
    }

    #[test]
    fn kinds_change() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        for kind in [Kind::FILE, Kind::DIRECTORY, Kind::SYMLINK, Kind::DIRECTORY, Kind::FILE, Kind::SYMLINK] {
            round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), entry(kind, "x", "y")]).unwrap();
        }
    }

    #[test]
    fn nothing_leaves_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        for path in ["..", "/etc/x", "a/../../b"] {
            assert!(round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::FILE, path, "")]).is_err());
        }
        let through = vec![
            entry(Kind::DIRECTORY, "", ""),
            entry(Kind::SYMLINK, "out", "/tmp"),
            entry(Kind::FILE, "out/husk-mirror-test/x", "y"),
        ];
        assert!(round(&mirrors, through).is_err());
        let escaping = MirrorRequest { container_id: "../x".into(), last: true, ..Default::default() };
        assert!(mirrors.apply(&escaping).is_err());
    }

    proptest! {
        #[test]
        fn any_path_stays_inside(path: Vec<u8>) {
            if let Ok(path) = relative(OsStr::from_bytes(&path)) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
