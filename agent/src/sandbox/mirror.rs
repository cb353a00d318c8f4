//! Mirrored volumes are volumes of the host that are copied to the guest. To keep the copies up to date, the shim sends
//! entries. Each entry describes a file, a directory or a symbolic link.
//!
//! A round consists of one or more messages that together contain all entries of a volume. At the end of a round, the
//! agent removes from the copy every path that was not in the round.
//!
//! The copies are on a file system of the guest. Therefore a container can watch the copies with inotify(7). The agent
//! does not write unchanged entries again. It writes a new or changed file to a temporary path, and then renames the
//! file. Therefore a reader sees either the old or the new version.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};

use husk_base::sync::lock;
use husk_proto::GUEST_MIRRORS;
use husk_proto::agent::mirror_entry::Kind;
use husk_proto::agent::{MirrorEntry, UpdateMirrorRequest};

/// The mirrored volumes of all containers.
pub struct Mirrors {
    root: PathBuf,
    /// Unfinished rounds. The key is the container id and the mount's number. The value contains the paths of the round
    /// so far.
    rounds: Mutex<HashMap<(String, u32), BTreeSet<PathBuf>>>,
}

impl Default for Mirrors {
    fn default() -> Self {
        Self::at(GUEST_MIRRORS.into())
    }
}

impl Mirrors {
    /// Returns [`Mirrors`] that keep the copies below `root`. Tests pass a temporary directory.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root, rounds: Mutex::default() }
    }

    /// Removes a container's mirrored volumes and the state of its unfinished rounds. Does blocking I/O.
    pub fn remove(&self, container: &str) {
        let Ok(name) = path_component(OsStr::new(container)) else { return };
        // This thread holds the lock during the removal. Therefore no other thread can apply an entry at the same time.
        let mut rounds = lock(&self.rounds);
        rounds.retain(|(of, _), _| of != container);
        let path = self.root.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("failed to remove the mirrored volumes in {}: {error}", path.display());
            }
            _ => {}
        }
    }

    /// Applies the entries of one message. Does blocking I/O.
    ///
    /// # Errors
    /// Fails if a path in the message is invalid, or if a file operation fails. Entries that were applied before the
    /// error stay in the copy.
    pub fn apply(&self, request: &UpdateMirrorRequest) -> io::Result<()> {
        let container = self.root.join(path_component(OsStr::new(&request.container_id))?);
        let (root, temporary) =
            (container.join(request.mount.to_string()), container.join(format!("{}.new", request.mount)));
        fs::create_dir_all(&container)?;
        // All users get search permission, because a container that mounts a volume from here can run as any user.
        // Only the owner gets read permission, so that no other user can list the directory.
        fs::set_permissions(&self.root, Permissions::from_mode(0o711))?;
        let key = (request.container_id.clone(), request.mount);
        let mut rounds = lock(&self.rounds);
        let named = rounds.entry(key.clone()).or_default();
        for entry in &request.entries {
            let path = relative_path(OsStr::from_bytes(&entry.path))?;
            if path.as_os_str().is_empty() {
                // The entry of the volume's root begins a new round. Forget the paths of an earlier, unfinished round.
                named.clear();
            }
            apply_entry(&root, &path, &temporary, entry).map_err(|error| {
                io::Error::new(error.kind(), format!("failed to write {}: {error}", path.display()))
            })?;
            named.insert(path);
        }
        if request.last {
            let named = rounds.remove(&key).unwrap_or_default();
            prune(&root, Path::new(""), &named)?;
        }
        Ok(())
    }
}

/// Checks that `name` is a single normal path component.
fn path_component(name: &OsStr) -> io::Result<&OsStr> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(part),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Checks that `path` is relative and has no `..`.
fn relative_path(path: &OsStr) -> io::Result<PathBuf> {
    let path = Path::new(path);
    match path.components().all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(path.to_path_buf()),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Applies one entry. All parents of `path` must be directories, not symbolic links. The shim sends the entries of the
/// parents first.
fn apply_entry(root: &Path, path: &Path, temporary: &Path, entry: &MirrorEntry) -> io::Result<()> {
    let mut parent = root.to_path_buf();
    for part in path.parent().into_iter().flat_map(Path::components) {
        if !fs::symlink_metadata(&parent)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        parent.push(part);
    }
    let kind = entry.kind.enum_value_or_default();
    if path.as_os_str().is_empty() && kind != Kind::DIRECTORY {
        // The volume's root must be a directory. If the root were a symbolic link, a container could mount any
        // directory of the guest.
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let target = root.join(path);
    let present = fs::symlink_metadata(&target).ok();
    match kind {
        Kind::DIRECTORY => {
            if !present.as_ref().is_some_and(Metadata::is_dir) {
                remove_existing(&target, present.as_ref())?;
                fs::create_dir(&target)?;
            }
            set_owner_and_mode(&target, entry)
        }
        Kind::SYMLINK => {
            let link = PathBuf::from(std::ffi::OsString::from_vec(entry.content.clone()));
            if fs::read_link(&target).is_ok_and(|existing| existing == link) {
                return Ok(());
            }
            if present.as_ref().is_some_and(Metadata::is_dir) {
                remove_existing(&target, present.as_ref())?;
            }
            let _ = fs::remove_file(temporary);
            symlink(link, temporary)?;
            lchown(temporary, Some(entry.uid), Some(entry.gid))?;
            fs::rename(temporary, &target)
        }
        Kind::FILE => {
            if entry.offset == 0 && !entry.more && is_unchanged(&target, present.as_ref(), entry) {
                return Ok(());
            }
            let mut file = open_temporary(temporary, entry.offset)?;
            file.write_all(&entry.content)?;
            if entry.more {
                return Ok(());
            }
            set_owner_and_mode(temporary, entry)?;
            let modified = UNIX_EPOCH + Duration::from_nanos(u64::try_from(entry.modified_ns).unwrap_or(0));
            File::set_modified(&file, modified)?;
            if present.as_ref().is_some_and(Metadata::is_dir) {
                remove_existing(&target, present.as_ref())?;
            }
            fs::rename(temporary, &target)
        }
    }
}

/// Opens the temporary file for appending at `offset`. If `offset` is 0, removes whatever an earlier round left at
/// this path, and creates the file.
fn open_temporary(temporary: &Path, offset: u64) -> io::Result<File> {
    if offset > 0 {
        // This path can be a symbolic link that the agent failed to rename. In this case, O_NOFOLLOW makes the open
        // fail.
        let file = OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(temporary)?;
        return if file.metadata()?.len() == offset { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) };
    }
    remove_existing(temporary, fs::symlink_metadata(temporary).ok().as_ref())?;
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(temporary)
}

/// Sets the owner and the mode of `path` if they differ from those of the entry.
fn set_owner_and_mode(path: &Path, entry: &MirrorEntry) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if (meta.uid(), meta.gid()) != (entry.uid, entry.gid) {
        chown(path, Some(entry.uid), Some(entry.gid))?;
    }
    // The mode is set after the owner, because changing the owner clears the set-user-ID and set-group-ID bits.
    if fs::symlink_metadata(path)?.mode() & 0o7777 != entry.mode & 0o7777 {
        fs::set_permissions(path, Permissions::from_mode(entry.mode & 0o7777))?;
    }
    Ok(())
}

/// Returns whether the file already has the entry's owner, mode and content.
fn is_unchanged(target: &Path, present: Option<&Metadata>, entry: &MirrorEntry) -> bool {
    present.is_some_and(|meta| {
        meta.is_file()
            && (meta.uid(), meta.gid(), meta.mode() & 0o7777) == (entry.uid, entry.gid, entry.mode & 0o7777)
            && meta.len() == entry.content.len() as u64
            && fs::read(target).is_ok_and(|existing| existing == entry.content)
    })
}

fn remove_existing(path: &Path, present: Option<&Metadata>) -> io::Result<()> {
    match present {
        None => Ok(()),
        Some(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
    }
}

/// Removes the files and directories under `root`/`below` that are not in `keep`. Paths in `keep` are relative to
/// `root`.
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
    use proptest::prelude::*;

    use super::*;

    fn entry(kind: Kind, path: &str, content: &str) -> MirrorEntry {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
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
        mirrors.apply(&UpdateMirrorRequest {
            container_id: "c".into(),
            mount: 3,
            entries,
            last: true,
            ..Default::default()
        })
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
    fn round_removes_entries_that_only_the_previous_round_named() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        round(&mirrors, projected("..1", "old")).unwrap();
        let volume = dir.path().join("m/c/3");
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "old");
        round(&mirrors, projected("..2", "new")).unwrap();
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "new");
        assert!(!volume.join("..1").exists());
        // The agent does not write unchanged entries again.
        let inode = fs::metadata(volume.join("key")).unwrap().ino();
        round(&mirrors, projected("..2", "new")).unwrap();
        assert_eq!(fs::metadata(volume.join("key")).unwrap().ino(), inode);
    }

    #[test]
    fn file_can_be_sent_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        let piece = MirrorEntry { more: true, ..entry(Kind::FILE, "f", "one ") };
        let rest = MirrorEntry { offset: 4, ..entry(Kind::FILE, "f", "two") };
        round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), piece, rest.clone()]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("m/c/3/f")).unwrap(), "one two");
        assert!(
            round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), rest]).is_err(),
            "accepted a piece although the preceding piece is missing"
        );
    }

    #[test]
    fn next_round_removes_files_of_an_abandoned_round() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        let piece = MirrorEntry { more: true, ..entry(Kind::FILE, "..1/large", "half of it") };
        let begun = vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::DIRECTORY, "..1", ""), piece];
        let request = UpdateMirrorRequest { container_id: "c".into(), mount: 3, entries: begun, ..Default::default() };
        mirrors.apply(&request).unwrap();
        round(&mirrors, projected("..2", "new")).unwrap();
        let volume = dir.path().join("m/c/3");
        assert_eq!(fs::read_to_string(volume.join("key")).unwrap(), "new");
        assert!(!volume.join("..1").exists());
    }

    #[test]
    fn remove_deletes_all_copies_of_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::FILE, "a", "1")]).unwrap();
        let entries = vec![entry(Kind::DIRECTORY, "", "")];
        let request = UpdateMirrorRequest { container_id: "c".into(), mount: 8, entries, ..Default::default() };
        mirrors.apply(&request).unwrap();
        mirrors.remove("no-such");
        mirrors.remove("..");
        assert!(dir.path().join("m/c/8").exists());
        mirrors.remove("c");
        assert!(!dir.path().join("m/c").exists());
        assert!(mirrors.rounds.lock().unwrap().is_empty());
    }

    #[test]
    fn entry_can_change_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let mirrors = Mirrors::at(dir.path().join("m"));
        for kind in [Kind::FILE, Kind::DIRECTORY, Kind::SYMLINK, Kind::DIRECTORY, Kind::FILE, Kind::SYMLINK] {
            round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), entry(kind, "x", "y")]).unwrap();
        }
    }

    #[test]
    fn paths_outside_the_volume_are_rejected() {
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
        let root = dir.path().join("m/c/3");
        for kind in [Kind::SYMLINK, Kind::FILE] {
            assert!(round(&mirrors, vec![entry(kind, "", "/tmp")]).is_err());
            assert!(fs::symlink_metadata(&root).unwrap().is_dir());
        }
        let victim = dir.path().join("victim");
        fs::write(&victim, "four").unwrap();
        // The name is too long for rename(2). Therefore the link stays at the temporary path.
        let link = entry(Kind::SYMLINK, &"x".repeat(256), victim.to_str().unwrap());
        let rest = MirrorEntry { offset: 4, ..entry(Kind::FILE, "f", "more") };
        assert!(round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), link]).is_err());
        assert!(round(&mirrors, vec![entry(Kind::DIRECTORY, "", ""), rest]).is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "four");
        let escaping = UpdateMirrorRequest { container_id: "../x".into(), last: true, ..Default::default() };
        assert!(mirrors.apply(&escaping).is_err());
    }

    proptest! {
        #[test]
        fn relative_path_never_leaves_the_volume(path: Vec<u8>) {
            if let Ok(path) = relative_path(OsStr::from_bytes(&path)) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
