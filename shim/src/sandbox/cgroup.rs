//! The sandbox's cgroup on the host: everything that runs for the pod is accounted where containerd expects it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Mount point of cgroup v2.
const MOUNT: &str = "/sys/fs/cgroup";

/// A cgroup this process made and moved into.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Where the process came from and goes back to before the removal.
    origin: Option<PathBuf>,
    namespace: String,
}

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification names something outside the hierarchy.
    #[error("cgroupsPath {0:?} is no path within the cgroup hierarchy")]
    Path(String),
    /// It cannot be made.
    #[error("making the cgroup {path}")]
    Create {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nothing can be moved in.
    #[error("moving into the cgroup {path}")]
    Enter {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The cgroup a `cgroupsPath` means: a path, or systemd's `slice:prefix:name`.
///
/// # Errors
/// [`CgroupError::Path`] when it would lead out of the hierarchy.
pub fn relative_path(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let error = || CgroupError::Path(cgroups_path.to_owned());
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let text = match parts.as_slice() {
        [path] => (*path).to_owned(),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let unit = if name.ends_with(".slice") { (*name).to_owned() } else { format!("{prefix}-{name}.scope") };
            format!("{}/{unit}", expand_slice(slice).ok_or_else(error)?)
        }
        _ => return Err(error()),
    };
    let mut path = PathBuf::new();
    for component in Path::new(&text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(error()),
        }
    }
    if path.as_os_str().is_empty() { Err(error()) } else { Ok(path) }
}

/// systemd keeps `a-b.slice` in `a.slice`.
fn expand_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(String::new());
    }
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let mut path = String::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix = if prefix.is_empty() { part.to_owned() } else { format!("{prefix}-{part}") };
        path.push_str(&format!("/{prefix}.slice"));
    }
    Some(path)
}

/// Whether this host has the unified hierarchy.
pub fn is_unified() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

impl Cgroup {
    /// Makes the cgroup and moves this process, which has no other threads yet, into it.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing is left behind then.
    pub fn enter(cgroups_path: &str, namespace: &str) -> Result<Self, CgroupError> {
        let path = Path::new(MOUNT).join(relative_path(cgroups_path)?);
        let origin = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
            let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
            Some(Path::new(MOUNT).join(path))
        });
        // Two tries: another sandbox may just be removing the parent.
        std::fs::create_dir_all(&path)
            .or_else(|_| std::fs::create_dir_all(&path))
            .map_err(|source| CgroupError::Create { path: path.clone(), source })?;
        // Before anything runs in it: what was used before is never charged to it.
        delegate(Path::new(MOUNT), &path);
        let cgroup = Self { path, origin, namespace: namespace.to_owned() };
        match std::fs::write(cgroup.path.join("cgroup.procs"), "0") {
            Ok(()) => Ok(cgroup),
            Err(source) => {
                let _ = std::fs::remove_dir(&cgroup.path);
                Err(CgroupError::Enter { path: cgroup.path.clone(), source })
            }
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves this process back and removes the cgroup, and containerd's own above it when this was the last in it.
    pub async fn leave_and_remove(&self) {
        let origin = self.origin.as_deref().unwrap_or(Path::new(MOUNT));
        if std::fs::write(origin.join("cgroup.procs"), "0").is_err() {
            let _ = std::fs::write(Path::new(MOUNT).join("cgroup.procs"), "0");
        }
        let (path, namespace) = (self.path.clone(), self.namespace.clone());
        // The wait for the last process would hold up everything else on this thread.
        if let Err(error) = tokio::task::spawn_blocking(move || remove(&path, &namespace)).await {
            tracing::warn!(path = %self.path.display(), "cannot remove the cgroup: {error}");
        }
    }
}

/// Turns the controllers on for `path` in everything above it, as runc does: without them a cgroup counts neither time
/// nor memory. One that cannot be had (its parent has processes of its own) is done without.
fn delegate(mount: &Path, path: &Path) {
    let mut above: Vec<&Path> = path.ancestors().skip(1).take_while(|parent| parent.starts_with(mount)).collect();
    above.reverse();
    for parent in above {
        let read = |name| std::fs::read_to_string(parent.join(name)).unwrap_or_default();
        let (has, on) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
        let on: Vec<&str> = on.split_whitespace().collect();
        for controller in has.split_whitespace().filter(|controller| !on.contains(controller)) {
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// Removes a sandbox' cgroup with what is below it, and containerd's own for the namespace when it was the last in it.
/// Waits a second at most for the end of processes that were killed.
pub fn remove(path: &Path, namespace: &str) {
    if !path.starts_with(MOUNT) || path == Path::new(MOUNT) || path.components().any(|c| c == Component::ParentDir) {
        return;
    }
    remove_tree(path);
    if let Some(parent) = path.parent()
        && parent == Path::new(MOUNT).join(namespace)
    {
        let _ = std::fs::remove_dir(parent);
    }
}

/// How long a cgroup's last processes, killed already, may take to be gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes a cgroup and those below it.
fn remove_tree(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    // Of this cgroup and of all below it: a process that was just killed leaves a moment after it was reaped.
    let empty = wait_until_empty(path, deadline);
    if let Err(error) = empty.and_then(|()| remove_directories(path)) {
        tracing::warn!(path = %path.display(), "cannot remove the cgroup: {error}");
    }
}

fn remove_directories(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_directories(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Waits until no process is in the cgroup or below it. The kernel tells of a change of `cgroup.events` by POLLPRI to
/// whoever has read it since it was opened (cgroup-v2.rst, "Basic Operations").
fn wait_until_empty(path: &Path, deadline: Instant) -> io::Result<()> {
    let mut events = match File::open(path.join("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    loop {
        let mut text = String::new();
        let read = events.seek(SeekFrom::Start(0)).and_then(|_| events.read_to_string(&mut text));
        match read {
            // Removed by somebody else meanwhile.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(()),
            other => other?,
        };
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut wanted = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_turned_on_from_above() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods/one/sandbox");
        std::fs::create_dir_all(&path).unwrap();
        let control = |parent: &str| dir.path().join(parent).join("cgroup.subtree_control");
        for parent in ["", "pods", "pods/one", "pods/one/sandbox"] {
            std::fs::write(dir.path().join(parent).join("cgroup.controllers"), "memory\n").unwrap();
            std::fs::write(control(parent), "").unwrap();
        }
        std::fs::write(control(""), "cpu memory\n").unwrap();
        delegate(dir.path(), &path);
        let text = |parent| std::fs::read_to_string(control(parent)).unwrap();
        assert_eq!([text(""), text("pods"), text("pods/one")], ["cpu memory\n", "+memory", "+memory"]);
        assert_eq!(text("pods/one/sandbox"), "");
    }

    #[test]
    fn paths() {
        let path = |text: &str| relative_path(text).map(|path| path.display().to_string()).ok();
        assert_eq!(path("/default/c1").as_deref(), Some("default/c1"));
        assert_eq!(path("k8s.io/x").as_deref(), Some("k8s.io/x"));
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:abc").as_deref(),
            Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
        );
        assert_eq!(path(":p:n").as_deref(), Some("system.slice/p-n.scope"));
        for bad in ["", "/", "/../x", "a:b", "a/b.slice:p:n", "a--b.slice:p:n"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}
