//! The sandbox's cgroup on the host: everything that runs for the pod is accounted where containerd expects it.

mod legacy;
mod path;
mod remove;

use std::path::{Path, PathBuf};

pub use remove::remove;

use crate::systemd::{Unit, UnitError};

/// Mount point of cgroup v2, or of the directory with v1's.
const MOUNT: &str = "/sys/fs/cgroup";

/// How often a cgroup's directory is made when what is above it vanishes meanwhile.
const ATTEMPTS: u32 = 10;

/// Where a sandbox' cgroup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the one hierarchy of version 2.
    Unified(PathBuf),
    /// In those of version 1, with the controllers of each.
    Legacy(Vec<(Vec<String>, PathBuf)>),
}

/// A cgroup this process made and moved into.
#[derive(Debug)]
pub struct Cgroup {
    place: Place,
    /// Where the process came from and goes back to before the removal, for each directory.
    origins: Vec<PathBuf>,
    namespace: String,
    /// The scope that it is, where systemd made it.
    unit: Option<Unit>,
}

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification names something outside the hierarchy.
    #[error("cgroupsPath {0:?} is no path within the cgroup hierarchy")]
    Path(String),
    /// systemd was asked for it, and did not make it.
    #[error("having systemd make the cgroup")]
    Unit(#[from] UnitError),
    /// The host has none.
    #[error("no hierarchy of control groups is mounted below {MOUNT}")]
    None,
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

/// Whether this host has the unified hierarchy.
pub fn is_unified() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

impl Cgroup {
    /// Makes the cgroup, or has systemd make it, and moves this process into it. Blocks as long as systemd takes.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing is left behind then.
    pub fn enter(cgroups_path: &str, namespace: &str) -> Result<Self, CgroupError> {
        let path::Named { relative, scope } = path::named(cgroups_path)?;
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let (place, origins) = if is_unified() {
            let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
            (Place::Unified(Path::new(MOUNT).join(relative)), vec![Path::new(MOUNT).join(own)])
        } else {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            legacy::place(&mounts, &own, &relative, scope.is_some())
        };
        if place.dirs().next().is_none() {
            return Err(CgroupError::None);
        }
        if let Some(scope) = &scope {
            scope.start(std::process::id())?;
        }
        let cgroup = Self { place, origins, namespace: namespace.to_owned(), unit: scope.map(|scope| scope.unit) };
        let made = cgroup.make();
        if made.is_err() {
            // Of version 1 it may be in some already.
            cgroup.leave();
            cgroup.unit.iter().for_each(stop);
            cgroup.place.dirs().for_each(|path| drop(std::fs::remove_dir(path)));
        }
        made.map(|()| cgroup)
    }

    /// What systemd has of it, if that made it.
    pub fn unit(&self) -> Option<&Unit> {
        self.unit.as_ref()
    }

    fn make(&self) -> Result<(), CgroupError> {
        for path in self.place.dirs() {
            create(path).map_err(|source| CgroupError::Create { path: path.to_owned(), source })?;
        }
        // Before anything runs in it: what was used before is never charged to it.
        match &self.place {
            Place::Unified(path) => delegate(Path::new(MOUNT), path),
            Place::Legacy(_) => {
                if let Some(path) = self.place.of("cpuset") {
                    legacy::inherit_cpuset(Path::new(MOUNT), path);
                }
            }
        }
        for path in self.place.dirs() {
            std::fs::write(path.join("cgroup.procs"), "0")
                .map_err(|source| CgroupError::Enter { path: path.to_owned(), source })?;
        }
        Ok(())
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    fn leave(&self) {
        for (path, origin) in self.place.dirs().zip(&self.origins) {
            if std::fs::write(origin.join("cgroup.procs"), "0").is_err() {
                // Its own is gone; the root of the hierarchy is not.
                let root = path.ancestors().skip(1).take_while(|above| above.join("cgroup.procs").exists()).last();
                let _ = root.map(|root| std::fs::write(root.join("cgroup.procs"), "0"));
            }
        }
    }

    /// Moves this process back and removes the cgroup, and containerd's own above it when this was the last in it.
    pub async fn leave_and_remove(&self) {
        self.leave();
        let (place, namespace, unit) = (self.place.clone(), self.namespace.clone(), self.unit.clone());
        // The wait for the last process would hold up everything else on this thread.
        let removed = tokio::task::spawn_blocking(move || {
            let dirs: Vec<&Path> = place.dirs().collect();
            remove(&dirs, unit.as_ref(), &namespace);
        })
        .await;
        if let Err(error) = removed {
            tracing::warn!("cannot remove the cgroup: {error}");
        }
    }
}

impl Place {
    /// The directory where a controller's files are, if the host has it.
    pub fn of(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::Unified(path) => Some(path),
            Self::Legacy(all) => {
                all.iter().find(|(names, _)| names.iter().any(|name| name == controller)).map(|(_, path)| &**path)
            }
        }
    }

    /// The directories it consists of.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        let (one, all): (Option<&Path>, &[_]) = match self {
            Self::Unified(path) => (Some(path), &[]),
            Self::Legacy(all) => (None, all),
        };
        one.into_iter().chain(all.iter().map(|(_, path): &(Vec<String>, PathBuf)| path.as_path()))
    }
}

fn stop(unit: &Unit) {
    if let Err(error) = unit.stop() {
        tracing::warn!(error = %crate::chain(&error), "the scope is left to systemd");
    }
}

/// Makes a directory and those above it, which other sandboxes may just be removing as the last that were in them.
fn create(path: &Path) -> std::io::Result<()> {
    for _ in 1..ATTEMPTS {
        match std::fs::create_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    std::fs::create_dir_all(path)
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
}
