//! Mounts memory volumes, and bind-mounts subpaths of memory volumes and of volumes in the share.
//!
//! A memory volume is a tmpfs or hugetlbfs that the pod's containers share. It stays mounted as long as the pod lives.
//!
//! Containers can write to volumes. Therefore the agent opens a subpath component by component without following
//! symbolic links, and bind-mounts the opened file for the container. A symbolic link that is created later cannot
//! redirect this mount.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use husk_base::sync::lock;
use husk_proto::agent::{MountVolumeRequest, VolumeDirectory};
use husk_proto::{GUEST_SUBPATHS, SHARED_FS_TYPE, volume};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use crate::shared_volumes;

/// Supported file systems of memory volumes.
const KINDS: [&str; 2] = ["tmpfs", "hugetlbfs"];

/// Reason why mounting a volume or its subpath failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A name is not a single path component.
    #[error("invalid name {0:?}: it must be one path component")]
    Name(String),
    /// The file system type is not supported.
    #[error("unsupported file system type {0:?}: it must be tmpfs or hugetlbfs")]
    Type(String),
    /// Failed to create a mount point.
    #[error("failed to create directory {0}")]
    Directory(PathBuf, #[source] io::Error),
    /// Failed to create the mount point for a file of a volume.
    #[error("failed to create file {0}")]
    File(PathBuf, #[source] io::Error),
    /// Failed to mount a volume or subpath.
    #[error("failed to mount at {0}")]
    Mount(PathBuf, #[source] nix::Error),
    /// Failed to open a component of the subpath.
    #[error("failed to open {0:?} in the volume")]
    OpenSubpath(String, #[source] nix::Error),
    /// Failed to create a directory of the subpath.
    #[error("failed to create directory {0:?} in the volume")]
    CreateSubpath(String, #[source] nix::Error),
}

/// Names of the mounted memory volumes.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashSet<String>>);

impl Volumes {
    /// Mounts a volume unless it is already mounted. If the request has a subpath, bind-mounts the subpath for the
    /// container. Blocks the calling thread.
    ///
    /// # Errors
    /// After an error, a volume that has been mounted stays mounted.
    pub fn mount(&self, request: &MountVolumeRequest) -> Result<(), VolumeError> {
        let shared = request.fs_type == SHARED_FS_TYPE;
        for name in [&request.name, &request.container_id] {
            path_component(name)?;
        }
        let root = volume::root_path(request);
        if !shared {
            // The agent creates containers concurrently. The first request for the volume mounts it.
            let mut mounted = lock(&self.0);
            if !mounted.contains(&request.name) {
                let kind = request.fs_type.as_str();
                if !KINDS.contains(&kind) {
                    return Err(VolumeError::Type(kind.to_owned()));
                }
                make_dir(&root)?;
                let options = Some(request.options.as_str());
                mount(Some(kind), &root, Some(kind), MsFlags::empty(), options)
                    .map_err(|error| VolumeError::Mount(root.clone(), error))?;
                mounted.insert(request.name.clone());
            }
        }
        if request.directories.is_empty() {
            return Ok(());
        }
        bind_opened(|| open_subpath(&root, &request.directories), &volume::guest_path(request))
    }
}

/// Maximum number of attempts to bind a subpath. Each further attempt needs another container that ends meanwhile.
const MAX_BINDS: usize = 16;

/// Bind-mounts the file that `open` returns. `open` runs without the lock, because it can hang together with the file
/// system of the volume, and other volumes must not wait for it.
///
/// If another thread has unmounted the volume meanwhile, opens the file again, which mounts the volume again.
fn bind_opened(mut open: impl FnMut() -> Result<Subpath, VolumeError>, target: &Path) -> Result<(), VolumeError> {
    for _ in 1..MAX_BINDS {
        let found = open()?;
        let _guard = lock_shared_volumes();
        match bind(&found, target) {
            // The kernel binds only files of mounted file systems (`__do_loopback` in fs/namespace.c).
            Err(VolumeError::Mount(_, Errno::EINVAL)) => {}
            bound => return bound,
        }
    }
    let found = open()?;
    let _guard = lock_shared_volumes();
    bind(&found, target)
}

/// Lock that a thread holds while it binds a subpath or unmounts unused volumes of the share. The agent creates and
/// deletes containers concurrently. Without the lock, one thread could unmount a volume while another thread binds a
/// subpath of the volume.
static SHARED_VOLUMES_LOCK: Mutex<()> = Mutex::new(());

fn lock_shared_volumes() -> MutexGuard<'static, ()> {
    lock(&SHARED_VOLUMES_LOCK)
}

/// Unmounts the shared volumes whose paths are in `paths`. A shared volume stays mounted if a container uses one of its
/// subpaths. Blocks the calling thread.
pub fn unmount_unused(mut paths: Vec<PathBuf>) {
    let _guard = lock_shared_volumes();
    if !paths.is_empty() {
        let used = shared_volumes_in_use(Path::new(GUEST_SUBPATHS));
        paths.retain(|path| !used.contains(path));
    }
    shared_volumes::unmount(&paths);
}

/// Returns the shared volumes that have a subpath in use by a container. Derives the volumes from the paths
/// `<container>/<subpath>` below `dir`.
fn shared_volumes_in_use(dir: &Path) -> HashSet<PathBuf> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let names = entries(dir).flat_map(|container| entries(&container).collect::<Vec<_>>());
    names
        .filter_map(|part| volume::shared_volume_of(&Path::new(GUEST_SUBPATHS).join(part.strip_prefix(dir).ok()?)))
        .collect()
}

/// Unmounts all subpaths of a container. Returns the shared volumes that contain these subpaths.
pub fn remove_subpaths(container: &str) -> HashSet<PathBuf> {
    let path = Path::new(GUEST_SUBPATHS).join(container);
    let volumes =
        fs::read_dir(&path).into_iter().flatten().flatten().filter_map(|part| volume::shared_volume_of(&part.path()));
    let volumes = volumes.collect();
    for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
        if let Err(error) = umount2(&entry.path(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            tracing::warn!("failed to unmount {}: {error}", entry.path().display());
            // A volume is still mounted in this directory. Removing the directory would delete the volume's data.
            return HashSet::new();
        }
    }
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("failed to remove {}: {error}", path.display());
        }
        _ => {}
    }
    volumes
}

/// An opened subpath of a volume.
#[derive(Debug)]
pub(crate) struct Subpath {
    file: OwnedFd,
    is_directory: bool,
}

/// Opens a path below `root` and creates missing components as directories. If the last component already exists, it
/// may be a file.
pub(crate) fn open_subpath(root: &Path, directories: &[VolumeDirectory]) -> Result<Subpath, VolumeError> {
    let open_error = |name: &str| {
        let name = name.to_owned();
        move |error| VolumeError::OpenSubpath(name, error)
    };
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // O_DIRECTORY triggers the automount of a shared volume. O_PATH alone does not (fs/namei.c, `follow_automount`).
    let mut current =
        openat(nix::fcntl::AT_FDCWD, root, flags | OFlag::O_DIRECTORY, Mode::empty()).map_err(open_error("."))?;
    let mut is_directory = true;
    for directory in directories {
        let name = path_component(&directory.name)?;
        let next = match openat(&current, name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                create_directory(current.as_fd(), name, directory)
                    .map_err(|error| VolumeError::CreateSubpath(directory.name.clone(), error))?;
                openat(&current, name, flags, Mode::empty())
            }
            found => found,
        };
        current = next.map_err(open_error(&directory.name))?;
        let kind = kind(&current).map_err(open_error(&directory.name))?;
        if kind == SFlag::S_IFLNK {
            return Err(VolumeError::OpenSubpath(directory.name.clone(), Errno::ELOOP));
        }
        is_directory = kind == SFlag::S_IFDIR;
    }
    Ok(Subpath { file: current, is_directory })
}

fn create_directory(parent: BorrowedFd<'_>, name: &Path, directory: &VolumeDirectory) -> nix::Result<()> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        // After the open failed, another process created the directory. The directory keeps its owner and mode.
        Err(Errno::EEXIST) => return Ok(()),
        created => created?,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let created = openat(parent, name, flags, Mode::empty())?;
    fchown(&created, Some(Uid::from_raw(directory.uid)), Some(Gid::from_raw(directory.gid)))?;
    // The mode is set after the owner, because changing the owner clears the set-user-ID and set-group-ID bits.
    fchmod(&created, Mode::from_bits_truncate(directory.mode))
}

/// Creates `path` and its parents.
fn make_dir(path: &Path) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(|error| VolumeError::Directory(path.to_owned(), error))
}

/// Bind-mounts `source` at `target`. Makes no request to the file system of the volume, which can hang.
fn bind(source: &Subpath, target: &Path) -> Result<(), VolumeError> {
    let failed = |error| VolumeError::Mount(target.to_owned(), error);
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    if source.is_directory {
        make_dir(target)?;
    } else {
        fs::File::create(target).map_err(|error| VolumeError::File(target.to_owned(), error))?;
    }
    let source = format!("/proc/self/fd/{}", source.file.as_raw_fd());
    mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed)
}

fn kind(file: &OwnedFd) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(file)?.st_mode) & SFlag::S_IFMT)
}

/// Checks that `name` is a single normal path component.
fn path_component(name: &str) -> Result<&Path, VolumeError> {
    let path = Path::new(name);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(path),
        _ => Err(VolumeError::Name(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn directory(name: &str) -> VolumeDirectory {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        VolumeDirectory { name: name.into(), mode: 0o2770, uid, gid, ..Default::default() }
    }

    #[test]
    fn open_subpath_creates_directories_and_rejects_links() {
        let dir = tempfile::tempdir().unwrap();
        open_subpath(dir.path(), &[directory("a"), directory("b")]).unwrap();
        assert_eq!(fs::metadata(dir.path().join("a/b")).unwrap().mode() & 0o7777, 0o2770);
        fs::write(dir.path().join("a/file"), "x").unwrap();
        let file = open_subpath(dir.path(), &[directory("a"), directory("file")]).unwrap();
        assert!(!file.is_directory);
        symlink("/tmp", dir.path().join("out")).unwrap();
        for path in [&["out"][..], &["out", "x"], &["a", "file", "x"], &[".."], &["a/b"], &[""]] {
            let directories: Vec<_> = path.iter().map(|name| directory(name)).collect();
            assert!(open_subpath(dir.path(), &directories).is_err(), "{path:?}");
        }
    }

    #[test]
    fn bind_fails_if_the_target_cannot_be_created() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let source = open_subpath(dir.path(), &[directory("file")]).unwrap();
        let result = bind(&source, dir.path());
        let Err(VolumeError::File(path, error)) = result else { panic!("{result:?}") };
        assert_eq!((path.as_path(), error.raw_os_error()), (dir.path(), Some(libc::EISDIR)));
    }

    #[test]
    fn subpath_whose_file_system_hangs_does_not_hold_up_other_volumes() {
        let dir = tempfile::tempdir().unwrap();
        let result = bind_opened(
            || {
                // While the open hangs, the deletion of another container unmounts its volumes.
                unmount_unused(Vec::new());
                Err(VolumeError::OpenSubpath("a".into(), Errno::EIO))
            },
            &dir.path().join("target"),
        );
        assert!(matches!(result, Err(VolumeError::OpenSubpath(_, Errno::EIO))), "{result:?}");
    }

    #[test]
    fn volume_that_is_unmounted_while_its_subpath_is_opened_is_mounted_again() {
        let dir = tempfile::tempdir().unwrap();
        let (root, target) = (dir.path().join("volume"), dir.path().join("target"));
        fs::create_dir(&root).unwrap();
        // The mounts of this thread are its own.
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            let mut opened = 0;
            let open = || {
                mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                let found = open_subpath(&root, &[directory("a")]);
                opened += 1;
                if opened == 1 {
                    umount2(&root, MntFlags::MNT_DETACH).unwrap();
                }
                found
            };
            bind_opened(open, &target).unwrap();
            assert_eq!(opened, 2);
            fs::write(root.join("a/file"), "x").unwrap();
            assert!(target.join("file").exists());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn shared_volumes_in_use_reads_subpath_names() {
        let dir = tempfile::tempdir().unwrap();
        for part in ["a/3@1.x", "a/4", "b/0@2.y", "b/1@1.x"] {
            fs::create_dir_all(dir.path().join(part)).unwrap();
        }
        let volume = |name: &str| Path::new("/run/husk/share/.volumes").join(name);
        assert_eq!(shared_volumes_in_use(dir.path()), HashSet::from([volume("1.x"), volume("2.y")]));
        assert!(shared_volumes_in_use(&dir.path().join("none")).is_empty());
    }

    #[test]
    fn mount_rejects_unknown_file_systems_and_invalid_names() {
        let request = MountVolumeRequest {
            name: "a".into(),
            container_id: "c".into(),
            fs_type: "ext4".into(),
            ..Default::default()
        };
        assert!(matches!(Volumes::default().mount(&request), Err(VolumeError::Type(_))));
        let request = MountVolumeRequest { name: "../a".into(), fs_type: "tmpfs".into(), ..Default::default() };
        assert!(matches!(Volumes::default().mount(&request), Err(VolumeError::Name(_))));
    }
}
