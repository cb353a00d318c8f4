//! Paths that lead from the shim's mount namespace to files of the host.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::{HostView, open_path, path_of};
use crate::fs_types;

/// Maximum number of lookups of a path whose files appear and disappear meanwhile.
const MAX_LOOKUPS: usize = 8;

/// A path of the host that this process can use in its own mount namespace.
#[derive(Debug)]
pub struct Reached {
    /// The path, which is valid as long as this value.
    pub path: PathBuf,
    /// The file, or the deepest directory that exists. `None` if the path leads there in this process's namespace, too.
    existing: Option<OwnedFd>,
    /// The names below `existing`.
    missing: Vec<OsString>,
}

impl Reached {
    fn in_own_namespace(path: &Path) -> Self {
        Self { path: path.to_owned(), existing: None, missing: Vec::new() }
    }

    /// Creates the missing directories above the file. Follows no symlink that appears meanwhile.
    ///
    /// # Errors
    /// The errors of mkdir(2) and open(2).
    pub fn create_directories(&mut self) -> io::Result<()> {
        let Some((file, directories)) = self.missing.split_last() else {
            return match (&self.existing, self.path.parent()) {
                (None, Some(parent)) => fs::create_dir_all(parent),
                _ => Ok(()),
            };
        };
        for name in directories {
            let Some(parent) = &self.existing else { break };
            let path = path_of(parent).join(name);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let directory = open(&path, flags, Mode::empty())?;
            if fs_types::is_protected(&directory)? {
                return Err(Errno::EXDEV.into());
            }
            self.existing = Some(directory);
        }
        if let Some(parent) = &self.existing {
            self.path = path_of(parent).join(file);
        }
        self.missing = vec![file.clone()];
        Ok(())
    }

    /// Returns the flag with which the file must be opened. A file that did not exist may be a symlink by now. A file
    /// that exists is reached through a link in procfs.
    pub fn no_follow(&self) -> OFlag {
        if self.missing.is_empty() { OFlag::empty() } else { OFlag::O_NOFOLLOW }
    }
}

impl HostView {
    /// Returns a path that leads to the host's file at `path`. The file, and directories above it, need not exist. The
    /// returned path then leads into the deepest directory that exists.
    ///
    /// On a file system that is read-only in this process's namespace ([`crate::confinement`]), returns `path` itself.
    ///
    /// # Errors
    /// The errors of open(2), except ENOENT. Also fails if a symlink or `..` is where the path ends: from there, the
    /// path could lead to the host's mount of a file system that is read-only in this process's namespace.
    pub fn reach(&self, path: &Path) -> io::Result<Reached> {
        if self.thread().is_none() {
            return Ok(Reached::in_own_namespace(path));
        }
        for _ in 0..MAX_LOOKUPS {
            if let Some(reached) = self.reach_once(path)? {
                return Ok(reached);
            }
        }
        Err(io::Error::other("files of the path appear and disappear"))
    }

    /// Returns `None` if a file of the path has been created meanwhile.
    fn reach_once(&self, path: &Path) -> io::Result<Option<Reached>> {
        let mut existing = path;
        let file = loop {
            match (self.open(existing, true), existing.parent()) {
                (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => existing = parent,
                (opened, _) => break opened?,
            }
        };
        if fs_types::is_protected(&file)? {
            return Ok(Some(Reached::in_own_namespace(path)));
        }
        let rest = path.strip_prefix(existing).map_err(io::Error::other)?;
        let name = |component| match component {
            Component::Normal(name) => Ok(name.to_owned()),
            _ => {
                Err(io::Error::other(format!("{} does not exist, but the path continues with ..", existing.display())))
            }
        };
        let missing = rest.components().map(name).collect::<io::Result<Vec<_>>>()?;
        let mut reached = path_of(&file);
        if let Some(first) = missing.first() {
            match open_path(&reached.join(first), false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                found => {
                    let kind = SFlag::from_bits_truncate(fstat(&found?)?.st_mode) & SFlag::S_IFMT;
                    if kind != SFlag::S_IFLNK {
                        return Ok(None);
                    }
                    let link = existing.join(first);
                    let text = format!("{} is a symbolic link to a file that does not exist", link.display());
                    return Err(io::Error::other(text));
                }
            }
        }
        reached.extend(&missing);
        Ok(Some(Reached { path: reached, existing: Some(file), missing }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::thread;

    use super::*;
    use crate::daemon::mount_namespace;
    use crate::volumes::test_support::{isolated, tmpfs};

    /// Runs `test` in a namespace like that of the shim, with the host's view and an empty directory of the host.
    fn in_shim(test: impl FnOnce(&HostView, &Path) + Send + 'static) {
        isolated(|dir| {
            let (dir, host) = (dir.to_owned(), HostView::start().unwrap());
            tmpfs(&dir.join("later"));
            let shim = thread::spawn(move || {
                mount_namespace::enter(&[]).unwrap();
                test(&host, &dir.join("later"));
            });
            shim.join().unwrap();
        });
    }

    #[test]
    fn reach_leads_to_files_that_exist_only_on_the_host() {
        in_shim(|host, later| {
            let at = |path: &str| host.reach(&later.join(path)).unwrap();
            let mut new = at("new/deep/file");
            new.create_directories().unwrap();
            fs::write(&new.path, "new").unwrap();
            assert!(!later.join("new").exists());
            assert_eq!(fs::read_to_string(&at("new/deep/file").path).unwrap(), "new");
            assert_eq!(fs::read_to_string(&at("new/deep/../deep/file").path).unwrap(), "new");
            // The path of a protected file leads to this namespace's mount of the file.
            let protected = Path::new("/proc/sys/kernel/hostname");
            assert_eq!(host.reach(protected).unwrap().path, protected);
        });
    }

    #[test]
    fn reach_refuses_paths_that_could_lead_out_of_a_new_directory() {
        in_shim(|host, later| {
            let above = "../".repeat(later.components().count());
            let link = |name: &str, to: &str| symlink(to, host.reach(&later.join(name)).unwrap().path).unwrap();
            link("dangling", "gone");
            link("dangling-proc", &format!("{above}proc/gone"));
            let proc = format!("new/{above}proc/sys/kernel/hostname");
            for path in [&*proc, "new/..", "new/../x", "dangling", "dangling/x", "dangling-proc", "dangling-proc/x"] {
                assert!(host.reach(&later.join(path)).is_err(), "{path}");
            }
            // A symlink to a protected file leads to this namespace's mount of the file.
            link("proc", "/proc/sys/kernel/hostname");
            assert_eq!(host.reach(&later.join("proc")).unwrap().path, later.join("proc"));
        });
    }

    #[test]
    fn create_directories_follows_no_symlink_that_appears() {
        in_shim(|host, later| {
            let mut reached = host.reach(&later.join("new/deep/file")).unwrap();
            let link = host.reach(&later.join("new")).unwrap();
            symlink("/", &link.path).unwrap();
            assert!(reached.create_directories().is_err());
            fs::remove_file(&link.path).unwrap();
            reached.create_directories().unwrap();
            assert_eq!(reached.no_follow(), OFlag::O_NOFOLLOW);
            fs::write(&reached.path, "").unwrap();
            assert_eq!(host.reach(&later.join("new/deep/file")).unwrap().no_follow(), OFlag::empty());
        });
    }
}
