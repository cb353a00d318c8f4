//! Volumes of the guest's own: file systems in memory or of huge pages, shared by the pod's containers and kept as long
//! as the pod lives. And parts of these, and of volumes that the host shares.
//!
//! Containers write to them as they like, so a directory below one is looked for component by component without
//! following links, and what a container gets is a bind of what was found: no link planted later leads elsewhere.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use husk_proto::agent::{VolumeDirectory, VolumeRequest};
use husk_proto::{GUEST_SUBPATHS, SHARED, volume};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use crate::boot::mounts::{MountError, make_dir};
use crate::task::volumes;

/// What may be asked for.
const KINDS: [&str; 2] = ["tmpfs", "hugetlbfs"];

/// Why there is no such volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A name that is no name, or a file system that is none of these.
    #[error("{0:?} cannot be")]
    Invalid(String),
    /// A directory cannot be made.
    #[error(transparent)]
    Directory(#[from] MountError),
    /// A mount failed.
    #[error("mounting {0}")]
    Mount(PathBuf, #[source] nix::Error),
    /// A directory of the volume cannot be had.
    #[error("{0:?} of the volume")]
    Below(String, #[source] nix::Error),
}

/// The volumes there are.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashSet<String>>);

impl Volumes {
    /// Makes sure of a volume, and of the directory in it that a container is to have; blocks.
    ///
    /// # Errors
    /// [`VolumeError`]; a volume that was made stays.
    pub fn make(&self, request: &VolumeRequest) -> Result<(), VolumeError> {
        let shared = request.fs_type == SHARED;
        for name in [&request.name, &request.container_id] {
            plain(name)?;
        }
        let root = volume::root(request);
        if !shared {
            // Containers are made at once, and the first of them makes the volume.
            let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !made.contains(&request.name) {
                let kind = request.fs_type.as_str();
                if !KINDS.contains(&kind) {
                    return Err(VolumeError::Invalid(kind.to_owned()));
                }
                make_dir(&root)?;
                let options = Some(request.options.as_str());
                mount(Some(kind), &root, Some(kind), MsFlags::empty(), options)
                    .map_err(|error| VolumeError::Mount(root.clone(), error))?;
                made.insert(request.name.clone());
            }
        }
        if request.directories.is_empty() {
            return Ok(());
        }
        let _turn = turn();
        let found = descend(&root, &request.directories)?;
        bind(&found, &volume::path(request))
    }
}

/// Held while a part of a shared volume is taken, and while it is looked whether somebody has one: containers come and go
/// at once.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves those of the shared volumes at `paths` of which no container has a part; blocks.
pub fn leave(mut paths: Vec<PathBuf>) {
    let _turn = turn();
    if !paths.is_empty() {
        let taken = parts(Path::new(GUEST_SUBPATHS));
        paths.retain(|path| !taken.contains(path));
    }
    volumes::leave(&paths);
}

/// The shared volumes of which containers have parts, as `<container>/<part>` in a directory tells.
fn parts(dir: &Path) -> HashSet<PathBuf> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let names = entries(dir).flat_map(|container| entries(&container).collect::<Vec<_>>());
    names.filter_map(|part| volume::shared_of(&Path::new(GUEST_SUBPATHS).join(part.strip_prefix(dir).ok()?))).collect()
}

/// Takes away what was bound for a container, and gives the shared volumes it was of; that there is nothing is fine.
pub fn remove(container: &str) -> HashSet<PathBuf> {
    let path = Path::new(GUEST_SUBPATHS).join(container);
    let of = fs::read_dir(&path).into_iter().flatten().flatten().filter_map(|part| volume::shared_of(&part.path()));
    let of = of.collect();
    for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
        if let Err(error) = umount2(&entry.path(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            tracing::warn!("{}: {error}", entry.path().display());
            // What is still mounted is somebody's data.
            return HashSet::new();
        }
    }
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!("{}: {error}", path.display()),
        _ => {}
    }
    of
}

/// The directory below `root`, each component made where it is not there. The last may be a file by now.
fn descend(root: &Path, directories: &[VolumeDirectory]) -> Result<OwnedFd, VolumeError> {
    let below = |name: &str| {
        let name = name.to_owned();
        move |error| VolumeError::Below(name, error)
    };
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // As a directory: only so does the kernel make the mount that a shared volume is (fs/namei.c, `follow_automount`).
    let mut here =
        openat(nix::fcntl::AT_FDCWD, root, flags | OFlag::O_DIRECTORY, Mode::empty()).map_err(below("root"))?;
    for directory in directories {
        let name = plain(&directory.name)?;
        let next = match openat(&here, name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                make(here.as_fd(), name, directory).map_err(below(&directory.name))?;
                openat(&here, name, flags, Mode::empty())
            }
            found => found,
        };
        here = next.map_err(below(&directory.name))?;
        if kind(&here).map_err(below(&directory.name))? == SFlag::S_IFLNK {
            return Err(VolumeError::Below(directory.name.clone(), Errno::ELOOP));
        }
    }
    Ok(here)
}

fn make(parent: BorrowedFd<'_>, name: &Path, directory: &VolumeDirectory) -> nix::Result<()> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        // Somebody else was faster, and it is theirs.
        Err(Errno::EEXIST) => return Ok(()),
        made => made?,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    fchown(&made, Some(Uid::from_raw(directory.uid)), Some(Gid::from_raw(directory.gid)))?;
    // After the owner, whose change takes set-id bits away.
    fchmod(&made, Mode::from_bits_truncate(directory.mode))
}

fn bind(source: &OwnedFd, target: &Path) -> Result<(), VolumeError> {
    let failed = |error| VolumeError::Mount(target.to_owned(), error);
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    if kind(source).map_err(failed)? == SFlag::S_IFDIR {
        make_dir(target)?;
    } else {
        fs::File::create(target).map_err(|_| failed(Errno::EEXIST))?;
    }
    let source = format!("/proc/self/fd/{}", source.as_raw_fd());
    mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed)
}

fn kind(file: &OwnedFd) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(file)?.st_mode) & SFlag::S_IFMT)
}

/// A name that is one component of a path.
fn plain(name: &str) -> Result<&Path, VolumeError> {
    let path = Path::new(name);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(path),
        _ => Err(VolumeError::Invalid(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn directory(name: &str) -> VolumeDirectory {
        // SAFETY: neither call takes arguments.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        VolumeDirectory { name: name.into(), mode: 0o2770, uid, gid, ..Default::default() }
    }

    #[test]
    fn directories_are_made_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        descend(dir.path(), &[directory("a"), directory("b")]).unwrap();
        assert_eq!(fs::metadata(dir.path().join("a/b")).unwrap().mode() & 0o7777, 0o2770);
        fs::write(dir.path().join("a/file"), "x").unwrap();
        let file = descend(dir.path(), &[directory("a"), directory("file")]).unwrap();
        assert_eq!(kind(&file).unwrap(), SFlag::S_IFREG);
        symlink("/tmp", dir.path().join("out")).unwrap();
        for path in [&["out"][..], &["out", "x"], &["a", "file", "x"], &[".."], &["a/b"], &[""]] {
            let directories: Vec<_> = path.iter().map(|name| directory(name)).collect();
            assert!(descend(dir.path(), &directories).is_err(), "{path:?}");
        }
    }

    #[test]
    fn volumes_that_containers_have_parts_of() {
        let dir = tempfile::tempdir().unwrap();
        for part in ["a/3@1.x", "a/4", "b/0@2.y", "b/1@1.x"] {
            fs::create_dir_all(dir.path().join(part)).unwrap();
        }
        let volume = |name: &str| Path::new("/run/husk/share/.volumes").join(name);
        assert_eq!(parts(dir.path()), HashSet::from([volume("1.x"), volume("2.y")]));
        assert!(parts(&dir.path().join("none")).is_empty());
    }

    #[test]
    fn only_known_file_systems() {
        let request =
            VolumeRequest { name: "a".into(), container_id: "c".into(), fs_type: "ext4".into(), ..Default::default() };
        assert!(matches!(Volumes::default().make(&request), Err(VolumeError::Invalid(_))));
        let request = VolumeRequest { name: "../a".into(), fs_type: "tmpfs".into(), ..Default::default() };
        assert!(matches!(Volumes::default().make(&request), Err(VolumeError::Invalid(_))));
    }
}
