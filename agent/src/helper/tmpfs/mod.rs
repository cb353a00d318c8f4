//! tmpfs features of runc that libcontainer lacks: `tmpcopyup`, and inheriting the mode of the mount point's directory.
//!
//! A tmpfs with `tmpcopyup` gets the content that the image has at the mount point. This module mounts and fills the
//! tmpfs in the helper's private mount namespace. libcontainer then bind-mounts the tmpfs at its destination. The
//! namespace ends with the helper.

mod copy_up;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use libcontainer::oci_spec::runtime::{Mount, Spec};
use nix::Error as Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::fstat;

use crate::id_mappings::IdMappings;
use copy_up::CopyUpError;

/// Mount option of runc that the kernel does not know.
const COPY_UP: &str = "tmpcopyup";

/// Reason why preparing a tmpfs failed.
#[derive(Debug, thiserror::Error)]
pub enum TmpfsError {
    /// Failed to open the directory at the mount point.
    #[error("failed to open the directory at the mount point")]
    Underneath(#[source] io::Error),
    /// Failed to create the helper's private mount namespace.
    #[error("failed to create a private mount namespace")]
    Namespace(#[source] Errno),
    /// Failed to create or open the staging directory.
    #[error("failed to create the staging directory")]
    Directory(#[source] io::Error),
    /// Failed to mount the tmpfs.
    #[error("failed to mount the tmpfs at the staging directory")]
    Mount(#[source] Errno),
    /// The helper failed to enter or to leave the container's cgroup.
    #[error("failed to move the helper to another cgroup")]
    Cgroup(#[source] io::Error),
    /// Failed to copy the image's directory.
    #[error("failed to copy the image's directory ({COPY_UP})")]
    CopyUp(#[source] CopyUpError),
}

/// The directory in which tmpfs mounts are prepared, and the cgroup that is charged for their content.
pub struct Staging<'a> {
    /// The container's bundle, which only the agent can access.
    pub dir: &'a Path,
    /// Directory of the container's cgroup, which is charged for the memory of the copied content.
    pub cgroup: &'a Path,
}

/// Prepares the tmpfs mounts of `spec` for libcontainer. Returns whether the specification was changed.
///
/// # Errors
/// Returns the destination of the mount that failed, and the reason.
pub fn prepare(
    spec: &mut Spec,
    staging: &Staging<'_>,
    id_mappings: Option<&IdMappings>,
) -> Result<bool, (PathBuf, TmpfsError)> {
    let Some(root) = spec.root().as_ref().map(|root| root.path().clone()) else { return Ok(false) };
    let Some(mounts) = spec.mounts_mut() else { return Ok(false) };
    let mut earlier = EarlierMounts { root, mounts: Vec::new(), id_mappings };
    let mut changed = false;
    for (index, mount) in mounts.iter_mut().enumerate() {
        let destination = normalize(mount.destination());
        let stage = staging.dir.join(format!("tmpfs-{index}"));
        let prepared = prepare_one(mount, &destination, &earlier, &stage, staging.cgroup);
        let (content, mount_changed) = prepared.map_err(|error| (mount.destination().clone(), error))?;
        changed |= mount_changed;
        earlier.mounts.push((destination, content));
    }
    Ok(changed)
}

/// Directory whose content a mount shows at its destination. `None` if the mount is empty or if its content comes from
/// the kernel.
type Content = Option<PathBuf>;

fn prepare_one(
    mount: &mut Mount,
    destination: &Path,
    earlier: &EarlierMounts<'_>,
    stage: &Path,
    cgroup: &Path,
) -> Result<(Content, bool), TmpfsError> {
    let mut options = mount.options().clone().unwrap_or_default();
    let count = options.len();
    options.retain(|option| option != COPY_UP);
    let copy = options.len() != count;
    let mut changed = copy;
    let bind = mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind");
    let mut content = if bind { mount.source().clone() } else { None };
    let tmpfs = mount.typ().as_deref() == Some("tmpfs") && !bind;
    let underneath = if tmpfs { earlier.directory(destination).map_err(TmpfsError::Underneath)? } else { None };
    if let Some(directory) = underneath {
        if !options.iter().any(|option| option.starts_with("mode=")) {
            let status = fstat(&directory).map_err(|error| TmpfsError::Underneath(error.into()))?;
            options.push(format!("mode={:04o}", status.st_mode & 0o7777));
            changed = true;
        }
        if copy {
            let source = mount.source().clone().unwrap_or_else(|| "tmpfs".into());
            if let Some(id_mappings) = earlier.id_mappings {
                options = map_owner(options, id_mappings);
            }
            let (data, mut flags): (Vec<_>, Vec<_>) = options.into_iter().partition(|option| is_fs_option(option));
            mount_and_copy_up(&source, &data.join(","), &directory, stage, cgroup)?;
            flags.push("bind".to_owned());
            options = flags;
            mount.set_typ(Some("bind".to_owned())).set_source(Some(stage.to_owned()));
            content = Some(stage.to_owned());
        }
    }
    if changed {
        mount.set_options(Some(options));
    }
    Ok((content, changed))
}

/// Translates `uid=` and `gid=` to ids of the guest, because the tmpfs is mounted outside the container's user
/// namespace.
fn map_owner(options: Vec<String>, id_mappings: &IdMappings) -> Vec<String> {
    let id = |name: &str| options.iter().rev().find_map(|option| option.strip_prefix(name)?.parse().ok()).unwrap_or(0);
    let owner = [format!("uid={}", id_mappings.uid(id("uid="))), format!("gid={}", id_mappings.gid(id("gid=")))];
    options.into_iter().filter(|o| !o.starts_with("uid=") && !o.starts_with("gid=")).chain(owner).collect()
}

/// Whether an option belongs to the file system and not to the mount (tmpfs(5)).
fn is_fs_option(option: &str) -> bool {
    option.contains('=') || matches!(option, "noswap" | "inode32" | "inode64")
}

/// Mounts a tmpfs at `stage` and copies `from` into it. The memory of the copy is charged to `cgroup`.
fn mount_and_copy_up(source: &Path, data: &str, from: &OwnedFd, stage: &Path, cgroup: &Path) -> Result<(), TmpfsError> {
    let nothing: Option<&Path> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(TmpfsError::Namespace)?;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_SLAVE, nothing).map_err(TmpfsError::Namespace)?;
    fs::create_dir(stage).map_err(TmpfsError::Directory)?;
    mount(Some(source), stage, Some("tmpfs"), MsFlags::empty(), Some(data)).map_err(TmpfsError::Mount)?;
    let to = File::open(stage).map_err(TmpfsError::Directory)?;
    let original = current_cgroup().map_err(TmpfsError::Cgroup)?;
    let join = |cgroup: &Path| fs::write(cgroup.join("cgroup.procs"), "0").map_err(TmpfsError::Cgroup);
    join(cgroup)?;
    let filled = copy_up::copy_up(from.as_fd(), to.as_fd()).map_err(TmpfsError::CopyUp);
    join(&original)?;
    filled
}

/// Returns the directory of this process's cgroup.
fn current_cgroup() -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let name = text.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
    Ok(Path::new(crate::cgroup::MOUNT).join(name))
}

/// The image, and the mounts that precede the current mount in the specification.
///
/// [`EarlierMounts::directory`] compares destinations as strings. If a symbolic link of the image leads from a
/// destination into an earlier mount, the function opens the image's directory instead of the mount's directory. The
/// function never opens a directory outside the image and the mounts.
struct EarlierMounts<'a> {
    root: PathBuf,
    mounts: Vec<(PathBuf, Content)>,
    /// Id mappings of the container's user namespace.
    id_mappings: Option<&'a IdMappings>,
}

impl EarlierMounts<'_> {
    /// Opens the directory at `path` in the container. Returns `None` if no directory exists there, or if the mount
    /// there has no [`Content`].
    fn directory(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let covering = self.mounts.iter().rev().find_map(|(at, content)| Some((content, path.strip_prefix(at).ok()?)));
        let (base, relative) = match covering {
            None => (self.root.as_path(), path.strip_prefix("/").unwrap_or(path)),
            Some((Some(base), relative)) => (base.as_path(), relative),
            // The content of this mount comes from the kernel or is empty.
            Some((None, _)) => return Ok(None),
        };
        let base = match File::open(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(base.as_fd(), &Path::new(".").join(relative), how) {
            Ok(directory) => Ok(Some(directory)),
            // If the destination is missing, libcontainer creates it. If it is not a directory, libcontainer reports an
            // error.
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Returns a destination as an absolute path without `.` and `..`.
fn normalize(path: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => drop(result.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    result
}

#[cfg(test)]
mod tests;
