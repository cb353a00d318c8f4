//! The directory of the templates: a tmpfs that only root can access.
//!
//! A template is a directory ([`husk_config::template`]). It gets its name when it is complete. A shim opens the
//! files through a read-only mount. Therefore, a VMM cannot open them for writing, not even through its own fds in procfs.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use husk_base::sys::mount::{MOUNT_ATTR_RDONLY, clone_tree, set_attributes};
use husk_config::template::{CLASS, Class, MEMORY, STATE, STORE, is_complete};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, openat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::statvfs;

use super::class::Key;

/// Maximum number of templates. Each has about 50 MiB.
const MAX_TEMPLATES: usize = 8;
/// The tmpfs has at most this part of the node's memory.
const PART_OF_MEMORY: u64 = 8;
/// Beginning of the name of a template that is not complete.
const PARTIAL: &str = "partial-";

/// Prefix of the name of a file that delays the next attempt to make a template. The rest of the name is the key.
const DELAYED: &str = "delayed-";
/// How long an attempt to make a template is delayed after a failure.
const DELAY: Duration = Duration::from_secs(600);
/// Name of an empty file in a template: a guest that was made from the template has failed.
const STRUCK: &str = "struck";

/// The opened files of a template.
#[derive(Debug)]
pub struct Template {
    /// The file with the state.
    pub state: File,
    /// The file with the memory.
    pub memory: File,
    /// Which template it is.
    pub identity: Identity,
}

/// Identifies a template. Another template can have the same key later.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The key.
    pub key: Key,
    /// Device and inode of the file with the state.
    inode: (u64, u64),
}

fn inode(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Why a template cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory could not be used.
    #[error("failed to {step} {}", path.display())]
    File {
        /// What failed.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The directory is not private.
    #[error("{STORE} is not on a tmpfs, or is accessible to users other than root: remove it, and unmount it first")]
    NotPrivate,
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::File { step, path: path.to_owned(), source }
}

/// Opens a template that is not older than `max_age`. Returns `None` if there is none.
///
/// # Errors
/// [`StoreError`] if the directory cannot be used.
pub fn find(store: &Path, key: &Key, max_age: Duration) -> Result<Option<Template>, StoreError> {
    let dir = match open_private(store) {
        Err(StoreError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    // The files are opened in a copy of the mount that is read-only.
    let read_only = clone_tree(dir.as_fd(), false).map_err(failed("copy the mount of", store))?;
    set_attributes(read_only.as_fd(), MOUNT_ATTR_RDONLY, 0, false).map_err(failed("protect the mount of", store))?;
    let open = |file: &str| {
        let path = format!("{}/{file}", key.name);
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&read_only, path.as_str(), flags, Mode::empty()) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failed("open", &store.join(path))(errno.into())),
        }
    };
    let (Some(state), Some(memory)) = (open(STATE)?, open(MEMORY)?) else { return Ok(None) };
    let age =
        state.metadata().and_then(|metadata| metadata.modified()).map(|made| SystemTime::now().duration_since(made));
    // A template from the future is as bad as an old one: the clock was wrong.
    let is_young = matches!(age, Ok(Ok(age)) if age <= max_age);
    let identity = state.metadata().map(|metadata| Identity { key: key.clone(), inode: inode(&metadata) });
    let identity = identity.map_err(failed("examine", store))?;
    Ok(is_young.then_some(Template { state, memory, identity }))
}

/// Removes a template that cannot be used, and delays the next attempt to make it. Guests that were made from it go on.
/// Does nothing if the template has been replaced meanwhile. Best effort. Blocks the calling thread.
pub fn discard(store: &Path, template: &Identity) {
    let state = store.join(&template.key.name).join(STATE);
    if fs::symlink_metadata(state).is_ok_and(|metadata| inode(&metadata) == template.inode) {
        delay(store, &template.key);
        remove(store, &template.key.name);
    }
}

/// Records that a guest that was made from the template has failed. The template may be the reason, but also the pod or
/// the node. Therefore the template is removed only at the second failure. Best effort. Blocks the calling thread.
pub fn strike(store: &Path, template: &Identity) {
    let path = store.join(&template.key.name).join(STRUCK);
    match File::options().write(true).create_new(true).open(&path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => discard(store, template),
        Err(error) => tracing::debug!(%error, path = %path.display(), "failed to record the failure of a template"),
    }
}

/// Delays the next attempt to make a template by [`DELAY`]. Best effort.
pub fn delay(store: &Path, key: &Key) {
    let path = store.join(format!("{DELAYED}{}", key.name));
    if let Err(error) = File::create(&path) {
        tracing::debug!(%error, path = %path.display(), "failed to delay the next attempt to make a template");
    }
}

/// Returns whether the next attempt to make a template has to wait.
pub fn is_delayed(store: &Path, key: &Key) -> bool {
    is_recent(&store.join(format!("{DELAYED}{}", key.name)))
}

/// Returns whether a file that delays an attempt still does so.
fn is_recent(path: &Path) -> bool {
    let at = fs::metadata(path).and_then(|metadata| metadata.modified());
    at.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < DELAY))
}

fn remove(store: &Path, name: &str) {
    let path = store.join(name);
    let removed = match fs::remove_dir_all(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(&path),
        removed => removed,
    };
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "failed to remove a template");
    }
}

fn open_private(store: &Path) -> Result<OwnedFd, StoreError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = openat(AT_FDCWD, store, flags, Mode::empty()).map_err(|errno| failed("open", store)(errno.into()))?;
    let metadata = dir.try_clone().map(File::from).and_then(|dir| dir.metadata()).map_err(failed("examine", store))?;
    let kind = fstatfs(dir.as_fd()).map_err(|errno| failed("examine", store)(errno.into()))?.filesystem_type();
    let is_private = metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o077 == 0;
    if is_private && kind == TMPFS_MAGIC { Ok(dir) } else { Err(StoreError::NotPrivate) }
}

/// The directory, locked for the process that makes templates.
pub struct Store {
    path: PathBuf,
    _lock: Flock<File>,
}

/// A template that is not complete. If it is dropped, its files are removed.
pub struct Partial {
    path: PathBuf,
    /// The empty file for the state.
    pub state: File,
    /// The empty file for the memory.
    pub memory: File,
    /// An empty directory.
    pub empty: PathBuf,
}

impl Store {
    /// Mounts the directory if it is not mounted, and locks it. Returns `None` if another process makes a template.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(path: &Path) -> Result<Option<Self>, StoreError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("create", path)(error)),
            _ => {}
        }
        // The lock is on the mount point, so that only one process mounts the tmpfs.
        let parent = path.parent().unwrap_or(path);
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).map_err(failed("examine", path));
        let lock = path.with_extension("lock");
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let file = file.map_err(failed("open", &lock))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
        if device(path)? == device(parent)? {
            mount_tmpfs(path).map_err(failed("mount a tmpfs at", path))?;
        }
        drop(open_private(path)?);
        Ok(Some(Self { path: path.to_owned(), _lock: lock }))
    }

    /// Removes templates that are not complete or are older than `max_age`, and delays that have ended. Then removes the
    /// oldest templates until there is room for one more, whose files have `bytes` bytes. Best effort.
    pub fn make_room(&self, max_age: Duration, bytes: u64) {
        let mut templates = Vec::new();
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let made = entry.path().join(STATE).metadata().and_then(|state| state.modified());
            let age = made.ok().and_then(|made| SystemTime::now().duration_since(made).ok());
            match age {
                Some(age) if is_complete(&name) && age <= max_age => templates.push((age, name)),
                _ if name.starts_with(PARTIAL) || is_complete(&name) => remove(&self.path, &name),
                _ if name.starts_with(DELAYED) && !is_recent(&entry.path()) => remove(&self.path, &name),
                _ => {}
            }
        }
        templates.sort();
        while templates.len() >= MAX_TEMPLATES || self.available().is_some_and(|available| available < bytes) {
            let Some((_, oldest)) = templates.pop() else { return };
            remove(&self.path, &oldest);
        }
    }

    /// Returns the number of bytes for which the tmpfs has room.
    fn available(&self) -> Option<u64> {
        let space = statvfs(&self.path).ok()?;
        Some(space.blocks_available() * space.fragment_size())
    }

    /// Creates the files of a template.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn begin(&self, key: &Key, class: &Class) -> Result<Partial, StoreError> {
        let path = self.path.join(format!("{PARTIAL}{}", key.name));
        let empty = path.join("empty");
        let dir = |path: &Path| DirBuilder::new().mode(0o700).create(path).map_err(failed("create", path));
        dir(&path)?;
        dir(&empty)?;
        let file = |name: &str| {
            let path = path.join(name);
            let created = File::options().read(true).write(true).create_new(true).mode(0o400).open(&path);
            created.map_err(failed("create", &path))
        };
        let text = serde_json::to_vec(class).map_err(|error| failed("write", &path.join(CLASS))(error.into()))?;
        file(CLASS)?.write_all(&text).map_err(failed("write", &path.join(CLASS)))?;
        Ok(Partial { state: file(STATE)?, memory: file(MEMORY)?, empty, path: path.clone() })
    }

    /// Gives a complete template its name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn finish(&self, partial: Partial, key: &Key) -> Result<(), StoreError> {
        let _ = fs::remove_dir(&partial.empty);
        let path = self.path.join(&key.name);
        remove_if_there(&path)?;
        fs::rename(&partial.path, &path).map_err(failed("rename", &partial.path))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Mounts a tmpfs whose pages are not swapped. Linux before 6.4 does not know `noswap`.
fn mount_tmpfs(path: &Path) -> io::Result<()> {
    let memory = nix::sys::sysinfo::sysinfo()?.ram_total();
    let options = format!("mode=0700,size={}", memory / PART_OF_MEMORY);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let tmpfs = |options: &str| mount(Some("husk-templates"), path, Some("tmpfs"), flags, Some(options));
    match tmpfs(&format!("{options},noswap")) {
        Err(Errno::EINVAL) => Ok(tmpfs(&options)?),
        mounted => Ok(mounted?),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::volumes::test_support::isolated;

    const DAY: Duration = Duration::from_secs(86400);

    fn class() -> Class {
        Class { vcpus: 1, max_vcpus: 3, memory_mib: 1024, max_memory_mib: 4096, huge_mib: 0, namespace: String::new() }
    }

    fn key(byte: u8) -> Key {
        Key { id: [byte; 32], name: format!("{byte:02x}").repeat(32) }
    }

    fn make(store: &Store, key: &Key) {
        let mut partial = store.begin(key, &class()).unwrap();
        partial.state.write_all(b"state").unwrap();
        partial.memory.write_all(b"memory").unwrap();
        store.finish(partial, key).unwrap();
    }

    #[test]
    fn template_is_found_read_only_when_it_is_complete() {
        isolated(|dir| {
            let path = dir.join("templates");
            assert!(find(&path, &key(1), DAY).unwrap().is_none());
            let store = Store::open(&path).unwrap().unwrap();
            assert!(Store::open(&path).unwrap().is_none(), "two processes have the lock");
            let partial = store.begin(&key(1), &class()).unwrap();
            assert!(find(&path, &key(1), DAY).unwrap().is_none());
            drop(partial);
            make(&store, &key(1));
            let mut found = find(&path, &key(1), DAY).unwrap().unwrap();
            let mut text = String::new();
            found.memory.read_to_string(&mut text).unwrap();
            assert_eq!(text, "memory");
            for file in [&found.state, &found.memory] {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let error = File::options().write(true).open(path).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            }
            assert!(find(&path, &key(2), DAY).unwrap().is_none());
            assert!(find(&path, &key(1), Duration::ZERO).unwrap().is_none());
            // A template that was made again replaces the old one, which can still be read.
            make(&store, &key(1));
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        });
    }

    #[test]
    fn store_that_others_can_access_is_refused() {
        isolated(|dir| {
            let path = dir.join("templates");
            fs::create_dir(&path).unwrap();
            assert!(matches!(find(&path, &key(1), DAY), Err(StoreError::NotPrivate)));
        });
    }

    #[test]
    fn template_is_removed_at_the_second_failure_unless_it_was_replaced() {
        isolated(|dir| {
            let path = dir.join("templates");
            let store = Store::open(&path).unwrap().unwrap();
            make(&store, &key(1));
            let found = || find(&path, &key(1), DAY).unwrap().map(|template| template.identity);
            let first = found().unwrap();
            strike(&path, &first);
            assert!(found().is_some() && !is_delayed(&path, &key(1)));
            strike(&path, &first);
            assert!(found().is_none() && is_delayed(&path, &key(1)) && !is_delayed(&path, &key(2)));
            // The failed guest is one of the former template.
            make(&store, &key(1));
            discard(&path, &first);
            assert!(found().is_some());
            discard(&path, &found().unwrap());
            assert!(found().is_none());
        });
    }

    #[test]
    fn old_templates_and_leftovers_make_room() {
        isolated(|dir| {
            let path = dir.join("templates");
            let store = Store::open(&path).unwrap().unwrap();
            let count = || fs::read_dir(&path).unwrap().count();
            let _unfinished = std::mem::ManuallyDrop::new(store.begin(&key(100), &class()).unwrap());
            for byte in 0..10 {
                make(&store, &key(byte));
            }
            assert_eq!(count(), 11);
            delay(&path, &key(50));
            store.make_room(DAY, 0);
            assert_eq!(count(), MAX_TEMPLATES - 1 + 1);
            // The templates that were made first are removed first.
            assert!(find(&path, &key(2), DAY).unwrap().is_none() && find(&path, &key(3), DAY).unwrap().is_some());
            store.make_room(Duration::ZERO, 0);
            assert!(count() == 1 && is_delayed(&path, &key(50)), "the delay of another template has ended");
        });
    }

    #[test]
    fn templates_make_room_if_the_tmpfs_is_full() {
        isolated(|dir| {
            let path = dir.join("templates");
            let store = Store::open(&path).unwrap().unwrap();
            for byte in 0..3 {
                let mut partial = store.begin(&key(byte), &class()).unwrap();
                partial.memory.write_all(&vec![1; 1 << 20]).unwrap();
                store.finish(partial, &key(byte)).unwrap();
            }
            let available = store.available().unwrap();
            store.make_room(DAY, available);
            assert_eq!(fs::read_dir(&path).unwrap().count(), 3);
            store.make_room(DAY, available + (1 << 20));
            assert!(find(&path, &key(0), DAY).unwrap().is_none() && find(&path, &key(1), DAY).unwrap().is_some());
            store.make_room(DAY, u64::MAX);
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        });
    }
}
