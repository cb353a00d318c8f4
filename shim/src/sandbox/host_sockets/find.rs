//! Finds a socket of the node in the share, and its paths on the node.
//!
//! The name of the volume and the path below it come from the agent, which is not trusted. The shim looks them up in
//! its own mount of the share. Therefore, only what the share contains can be found: no host-only file system, and
//! nothing behind a cover.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_vmm::config::is_private_mount;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstat};

use crate::host_view::HostView;
use crate::volumes::kubelet_paths::place_in_filesystem;
use crate::volumes::{mount_api, mountinfo, shared_mounts};

/// A socket in the share.
#[derive(Debug)]
pub struct Found {
    /// The socket, opened with O_PATH.
    pub file: OwnedFd,
    /// Paths that may lead to the socket on the node. A mount can cover a path.
    paths: Vec<PathBuf>,
}

/// Why no socket of the node was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The volume belongs to the pod, so that its sockets belong to the guest.
    #[error("the volume belongs to the pod")]
    Private,
    /// The share does not have the volume.
    #[error("the share has no volume {0:?}")]
    NoVolume(String),
    /// The file is not a socket.
    #[error("the file is not a socket")]
    NotASocket,
    /// A step failed.
    #[error("failed to {0}")]
    Step(&'static str, #[source] io::Error),
}

/// Finds the socket `path` in the volume `volume` of the share. `path` is empty if the volume is the socket. Blocks the
/// calling thread.
///
/// # Errors
/// [`FindError`].
pub fn find(share: &Path, volume: &str, path: &Path, host: &HostView) -> Result<Found, FindError> {
    let step = |step| move |error| FindError::Step(step, error);
    if is_private_mount(volume) {
        return Err(FindError::Private);
    }
    let volumes = mount_api::open_path(&share.join(shared_mounts::VOLUMES), false).map_err(step("open the volumes"))?;
    let root = open_beneath(&volumes, Path::new(volume)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => FindError::NoVolume(volume.to_owned()),
        _ => FindError::Step("open the volume", error),
    })?;
    // A mount point without its mount is about to be removed.
    let mount_id = |file: &OwnedFd| mount_api::mount_id(file.as_fd()).map_err(step("read the id of a mount"));
    if mount_id(&root)? == mount_id(&volumes)? {
        return Err(FindError::NoVolume(volume.to_owned()));
    }
    let file = match path.as_os_str().is_empty() {
        true => root,
        false => open_beneath(&root, path).map_err(step("open the socket"))?,
    };
    let stat = fstat(&file).map_err(|error| FindError::Step("stat the socket", error.into()))?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
        return Err(FindError::NotASocket);
    }
    let own = mountinfo::read().map_err(step("read the shim's mounts"))?;
    let (mount, place) = place_in_filesystem(&file, &own).map_err(step("determine the path of the socket"))?;
    let place = Path::new("/").join(place);
    let mounts = mountinfo::of_host(host).map_err(step("read the node's mounts"))?;
    let at = |entry: &mountinfo::Entry| {
        let rest = place.strip_prefix(&entry.root).ok()?;
        // `join` with an empty path would add a slash.
        Some(if rest.as_os_str().is_empty() { entry.point.clone() } else { entry.point.join(rest) })
    };
    let paths = mounts.iter().filter(|entry| entry.device == mount.device).filter_map(at).collect();
    Ok(Found { file, paths })
}

impl Found {
    /// Returns a path of the socket on the node for which `allow` returns true.
    ///
    /// # Errors
    /// The error of fstat(2).
    pub fn allowed_path(&self, host: &HostView, allow: impl Fn(&Path) -> bool) -> io::Result<Option<&Path>> {
        for path in self.paths.iter().filter(|path| allow(path)) {
            // Another mount may cover this path.
            if let Ok(file) = host.open(path, false)
                && is_same(&file, &self.file)?
            {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Returns the shortest path of the socket on the node.
    pub fn shortest_path(&self) -> Option<&Path> {
        self.paths.iter().map(PathBuf::as_path).min_by_key(|path| path.as_os_str().len())
    }
}

fn is_same(one: &OwnedFd, other: &OwnedFd) -> io::Result<bool> {
    let (one, other) = (fstat(one)?, fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// Opens `path` below `directory` with O_PATH, without following symlinks.
fn open_beneath(directory: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(resolve);
    Ok(openat2(directory, path, how)?)
}
