//! What runc does with tmpfs mounts and libcontainer does not: `tmpcopyup`, and the mode of the directory underneath.
//!
//! A tmpfs that is to hold what the image has in its place is mounted and filled here, in a mount namespace of the
//! helper's own, and libcontainer binds it where it belongs. The helper's namespace ends with the helper.

mod fill;

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

use crate::sandbox::users::Users;
use fill::FillError;

/// The option; the kernel does not know it.
const COPY_UP: &str = "tmpcopyup";

/// Why a tmpfs cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum TmpfsError {
    /// What the image has in the tmpfs's place cannot be looked at.
    #[error("cannot look at the directory underneath")]
    Underneath(#[source] io::Error),
    /// The helper gets no mount namespace of its own.
    #[error("cannot separate mounts")]
    Namespace(#[source] Errno),
    /// The directory for the tmpfs cannot be made.
    #[error("cannot make a directory for it")]
    Directory(#[source] io::Error),
    /// The kernel does not mount it.
    #[error("cannot mount it")]
    Mount(#[source] Errno),
    /// The helper cannot enter or leave the container's control group.
    #[error("cannot change control group")]
    Cgroup(#[source] io::Error),
    /// The content cannot be copied.
    #[error("{COPY_UP}")]
    Fill(#[source] FillError),
}

/// Where the tmpfs mounts to be filled are made, and who pays for them.
pub struct Staging<'a> {
    /// A directory of the container's, which only the agent can reach.
    pub dir: &'a Path,
    /// Directory of the container's control group: what is copied counts as the container's memory.
    pub cgroup: &'a Path,
}

/// Makes the tmpfs mounts of `spec` ready for libcontainer; whether that changed the specification.
///
/// # Errors
/// The mount's destination, and why it cannot be made.
pub fn prepare(spec: &mut Spec, staging: &Staging<'_>, users: Option<&Users>) -> Result<bool, (PathBuf, TmpfsError)> {
    let Some(root) = spec.root().as_ref().map(|root| root.path().clone()) else { return Ok(false) };
    let Some(mounts) = spec.mounts_mut() else { return Ok(false) };
    let mut earlier = Earlier { root, places: Vec::new(), users };
    let mut changed = false;
    for (index, mount) in mounts.iter_mut().enumerate() {
        let destination = normal(mount.destination());
        let stage = staging.dir.join(format!("tmpfs-{index}"));
        let one = prepare_one(mount, &destination, &earlier, &stage, staging.cgroup);
        let (content, one_changed) = one.map_err(|error| (mount.destination().clone(), error))?;
        changed |= one_changed;
        earlier.places.push((destination, content));
    }
    Ok(changed)
}

/// What a path below an earlier mount's destination shows.
type Content = Option<PathBuf>;

fn prepare_one(
    mount: &mut Mount,
    destination: &Path,
    earlier: &Earlier<'_>,
    stage: &Path,
    cgroup: &Path,
) -> Result<(Content, bool), TmpfsError> {
    let mut options = mount.options().clone().unwrap_or_default();
    let asked = options.len();
    options.retain(|option| option != COPY_UP);
    let copy = options.len() != asked;
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
            if let Some(users) = earlier.users {
                options = owned(options, users);
            }
            let (data, mut flags): (Vec<_>, Vec<_>) = options.into_iter().partition(|option| is_data(option));
            make(&source, &data.join(","), &directory, stage, cgroup)?;
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

/// The options of a tmpfs that is not mounted in the user namespace it is for: its owner is a user of that one.
fn owned(options: Vec<String>, users: &Users) -> Vec<String> {
    let id = |name: &str| options.iter().rev().find_map(|option| option.strip_prefix(name)?.parse().ok()).unwrap_or(0);
    let owner = [format!("uid={}", users.uid(id("uid="))), format!("gid={}", users.gid(id("gid=")))];
    options.into_iter().filter(|o| !o.starts_with("uid=") && !o.starts_with("gid=")).chain(owner).collect()
}

/// Whether an option is the file system's and not one of a mount (tmpfs(5)).
fn is_data(option: &str) -> bool {
    option.contains('=') || matches!(option, "noswap" | "inode32" | "inode64")
}

/// Mounts a tmpfs at `stage` and copies `from` into it.
fn make(source: &Path, data: &str, from: &OwnedFd, stage: &Path, cgroup: &Path) -> Result<(), TmpfsError> {
    let nothing: Option<&Path> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(TmpfsError::Namespace)?;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_SLAVE, nothing).map_err(TmpfsError::Namespace)?;
    fs::create_dir(stage).map_err(TmpfsError::Directory)?;
    mount(Some(source), stage, Some("tmpfs"), MsFlags::empty(), Some(data)).map_err(TmpfsError::Mount)?;
    let to = File::open(stage).map_err(TmpfsError::Directory)?;
    let home = own_cgroup().map_err(TmpfsError::Cgroup)?;
    let join = |group: &Path| fs::write(group.join("cgroup.procs"), "0").map_err(TmpfsError::Cgroup);
    join(cgroup)?;
    let filled = fill::fill(from.as_fd(), to.as_fd()).map_err(TmpfsError::Fill);
    join(&home)?;
    filled
}

/// Directory of this process's control group.
fn own_cgroup() -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let name = text.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
    Ok(Path::new(crate::cgroup::MOUNT).join(name))
}

/// What lies where a mount is about to go: the image, and on it the mounts before.
///
/// Destinations are compared as they are written. One that leads through a link of the image into an earlier mount
/// finds what the image has there instead of what was mounted; never anything outside of both.
struct Earlier<'a> {
    root: PathBuf,
    places: Vec<(PathBuf, Content)>,
    /// Those of the container's user namespace.
    users: Option<&'a Users>,
}

impl Earlier<'_> {
    /// The directory at `path` in the container, if there is one.
    fn directory(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let covering = self.places.iter().rev().find_map(|(at, content)| Some((content, path.strip_prefix(at).ok()?)));
        let (base, rest) = match covering {
            None => (self.root.as_path(), path.strip_prefix("/").unwrap_or(path)),
            Some((Some(base), rest)) => (base.as_path(), rest),
            // What such a mount holds comes from the kernel, or is nothing.
            Some((None, _)) => return Ok(None),
        };
        let base = match File::open(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(base.as_fd(), &Path::new(".").join(rest), how) {
            Ok(directory) => Ok(Some(directory)),
            // The first is made, the second refused when it comes to the mount.
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// A destination as an absolute path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
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
