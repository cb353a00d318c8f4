//! Opens the guest kernel and the initrd, and checks their digests.
//!
//! If the configuration has a file's digest, the VM boots from a copy of the file. The shim hashes the bytes while it
//! copies them. Therefore, a later change of the file has no effect on the VM.
//!
//! If the shim hashed the files at each start, starts would take too long. Therefore, the shim keeps the copies in a
//! directory on a tmpfs. Only root can access this directory. The name of a copy contains the digest, and the original
//! file's device, inode, size and times. If one of these values changes, the shim copies and hashes the file again.
//! Otherwise, the VM boots from the existing copy. This copy matches the digest even if the original file has changed.

use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use husk_config::{Config, digest};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

/// Directory of the copies.
pub const COPIES: &str = "/run/husk-images";

/// The opened files from which a guest boots.
#[derive(Debug)]
pub struct GuestImages {
    /// The guest kernel.
    pub kernel: File,
    /// The initrd.
    pub initrd: File,
    /// The kernel's digest, or [`identity`] if the configuration has no digest.
    pub kernel_identity: String,
    /// As `kernel_identity`, for the initrd.
    pub initrd_identity: String,
}

/// A failure to open a file or to check its digest.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("failed to open the {what} {path}")]
    Open {
        /// What the file is, such as `guest kernel`.
        what: &'static str,
        /// Path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read or copied.
    #[error("failed to verify the {what} {path}")]
    Verify {
        /// What the file is.
        what: &'static str,
        /// Path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file's digest differs from the digest in the configuration.
    #[error(
        "failed to verify the {what} {path}: expected SHA-256 {expected}, found {found}; install the right file, or \
         correct {key} in the configuration"
    )]
    Digest {
        /// What the file is.
        what: &'static str,
        /// Path.
        path: PathBuf,
        /// Key of the digest in the configuration.
        key: &'static str,
        /// Digest in the configuration.
        expected: String,
        /// Digest of the file.
        found: String,
    },
}

/// A file that the configuration names.
struct Image<'a> {
    what: &'static str,
    path: &'a Path,
    key: &'static str,
    /// Digest in the configuration. Empty if the file is not checked.
    digest: &'a str,
}

impl GuestImages {
    /// Opens the files that the configuration names.
    ///
    /// New copies are charged to this process's cgroup, and outlive the sandbox. Therefore, the process must not have
    /// entered the sandbox's cgroup yet.
    ///
    /// # Errors
    /// Fails with an [`ImageError`] that names the file that cannot be used.
    pub fn open(config: &Config) -> Result<Self, ImageError> {
        Self::open_with(config, Path::new(COPIES))
    }

    fn open_with(config: &Config, copies: &Path) -> Result<Self, ImageError> {
        let kernel =
            Image { what: "guest kernel", path: &config.kernel, key: "kernel_sha256", digest: &config.kernel_sha256 };
        let initrd = Image {
            what: "guest's initial RAM file system",
            path: &config.initrd,
            key: "initrd_sha256",
            digest: &config.initrd_sha256,
        };
        let copies = Copies::open(copies, [kernel.digest, initrd.digest]);
        let (kernel, kernel_identity) = kernel.open(copies.as_ref())?;
        let (initrd, initrd_identity) = initrd.open(copies.as_ref())?;
        Ok(Self { kernel, initrd, kernel_identity, initrd_identity })
    }
}

impl Image<'_> {
    /// Opens the file. Also returns its digest or identity.
    fn open(&self, copies: Option<&Copies>) -> Result<(File, String), ImageError> {
        let Self { what, path, digest: expected, .. } = *self;
        let path = || path.to_owned();
        let file = File::open(self.path).map_err(|source| ImageError::Open { what, path: path(), source })?;
        let failed = |source| ImageError::Verify { what, path: path(), source };
        let metadata = file.metadata().map_err(failed)?;
        if expected.is_empty() {
            return Ok((file, identity(&metadata)));
        }
        let name = copy_name(expected, &metadata);
        if let Some(copy) = copies.and_then(|copies| copies.find(&name, metadata.len())) {
            return Ok((copy, expected.to_owned()));
        }
        let mut copy = copies.and_then(Copies::create).map_or_else(memory_file, Ok).map_err(failed)?;
        let found = digest::sha256(file, |block| copy.write_all(block)).map_err(failed)?;
        if found != expected {
            let expected = expected.to_owned();
            return Err(ImageError::Digest { what, path: path(), key: self.key, expected, found });
        }
        if let Some(copies) = copies {
            copies.keep(&copy, expected, &name);
        }
        // Open the copy again, because the VMM must not get a writable fd.
        let copy = File::open(format!("/proc/self/fd/{}", copy.as_raw_fd())).map_err(failed)?;
        Ok((copy, expected.to_owned()))
    }
}

/// Returns the name of a file's copy. The name begins with the digest. The rest of the name changes if the file is
/// changed or replaced.
fn copy_name(digest: &str, file: &Metadata) -> String {
    format!("{digest}-{}", identity(file))
}

/// Returns a text that changes if the file is changed or replaced.
pub fn identity(file: &Metadata) -> String {
    format!(
        "{}-{}-{}-{}.{:09}-{}.{:09}",
        file.dev(),
        file.ino(),
        file.len(),
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec()
    )
}

/// Creates an unnamed file in memory.
fn memory_file() -> io::Result<File> {
    Ok(memfd_create("guest image", MFdFlags::MFD_CLOEXEC)?.into())
}

/// The directory of the copies.
struct Copies {
    dir: OwnedFd,
}

impl Copies {
    /// Opens the directory, and creates it if it does not exist. Removes all copies whose digest is not in `digests`.
    ///
    /// Returns `None` if both digests are empty. Also returns `None` if the directory cannot be opened, is not on a
    /// tmpfs, or is accessible to users other than root. Without the directory, each start copies and hashes the files.
    fn open(path: &Path, digests: [&str; 2]) -> Option<Self> {
        if digests.iter().all(|digest| digest.is_empty()) {
            return None;
        }
        let opened = Self::open_checked(path);
        if let Err(error) = &opened {
            tracing::warn!(
                %error,
                path = %path.display(),
                "failed to open the directory for copies of kernel and initrd; each start hashes these files"
            );
        }
        let copies = opened.ok()?;
        copies.remove(|name| !digests.iter().any(|digest| is_copy_of(name, digest)));
        Some(copies)
    }

    fn open_checked(path: &Path) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = openat(AT_FDCWD, path, flags, Mode::empty())?;
        let metadata = File::from(dir.try_clone()?).metadata()?;
        let private = metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o077 == 0;
        // A copy on a disk could be changed while the node is off.
        if private && fstatfs(dir.as_fd())?.filesystem_type() == TMPFS_MAGIC {
            return Ok(Self { dir });
        }
        Err(io::Error::other("the directory is not on a tmpfs, or is accessible to users other than root"))
    }

    /// Opens a copy, if it exists and is complete.
    fn find(&self, name: &str, length: u64) -> Option<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let copy = File::from(openat(&self.dir, name, flags, Mode::empty()).ok()?);
        let metadata = copy.metadata().ok()?;
        (metadata.is_file() && metadata.len() == length).then_some(copy)
    }

    /// Creates an unnamed file for a new copy. If the process is killed before [`Copies::keep`], the kernel removes the
    /// file.
    fn create(&self) -> Option<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        openat(&self.dir, ".", flags, Mode::S_IRUSR).ok().map(File::from)
    }

    /// Gives a complete copy its name, and removes other copies with the same digest. Best effort.
    fn keep(&self, copy: &File, digest: &str, name: &str) {
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        // Ignore a failure, because another shim may have made the same copy at the same time.
        let _ = linkat(AT_FDCWD, path.as_str(), &self.dir, name, AtFlags::AT_SYMLINK_FOLLOW);
        self.remove(|other| is_copy_of(other, digest) && other != name);
    }

    /// Removes each copy whose name satisfies `matches`. A VMM that has opened such a copy can still read the
    /// copy. Best effort.
    fn remove(&self, matches: impl Fn(&str) -> bool) {
        let path = format!("/proc/self/fd/{}", self.dir.as_raw_fd());
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(&matches) {
                let _ = unlinkat(&self.dir, entry.file_name().as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }
}

fn is_copy_of(name: &str, digest: &str) -> bool {
    !digest.is_empty() && name.split_once('-').is_some_and(|(of, _)| of == digest)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Files for a configuration, and a directory for copies. The directory is on a tmpfs.
    struct Node {
        dir: tempfile::TempDir,
        memory: tempfile::TempDir,
        config: Config,
    }

    impl Node {
        fn new() -> Self {
            let (dir, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
            let mut config = Config::default();
            (config.kernel, config.initrd) = (dir.path().join("kernel"), dir.path().join("initrd"));
            fs::write(&config.kernel, "the kernel").unwrap();
            fs::write(&config.initrd, "the initrd").unwrap();
            config.kernel_sha256 = sha256(&config.kernel);
            Self { dir, memory, config }
        }

        fn copies(&self) -> PathBuf {
            self.memory.path().join("copies")
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(self.copies()).into_iter().flatten();
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }

        fn open(&self) -> Result<[String; 2], ImageError> {
            let images = GuestImages::open_with(&self.config, &self.copies())?;
            Ok([images.kernel, images.initrd].map(|mut file| {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                assert!(file.write_all(b"x").is_err(), "the file is writable");
                text
            }))
        }

        fn error(&self) -> String {
            crate::chain(&self.open().unwrap_err())
        }
    }

    fn sha256(path: &Path) -> String {
        digest::sha256(File::open(path).unwrap(), |_| Ok(())).unwrap()
    }

    const BOTH: [&str; 2] = ["the kernel", "the initrd"];

    #[test]
    fn files_without_digest_are_not_copied() {
        let mut node = Node::new();
        node.config.kernel_sha256.clear();
        assert_eq!(node.open().unwrap(), BOTH);
        assert!(!node.copies().exists());
    }

    #[test]
    fn file_with_wrong_digest_is_refused_and_error_has_both_digests() {
        let mut node = Node::new();
        let found = std::mem::replace(&mut node.config.kernel_sha256, "0".repeat(64));
        let (path, zeros) = (node.config.kernel.display().to_string(), "0".repeat(64));
        let expected = format!(
            "failed to verify the guest kernel {path}: expected SHA-256 {zeros}, found {found}; install the right \
             file, or correct kernel_sha256 in the configuration"
        );
        assert_eq!(node.error(), expected);
        assert!(node.names().is_empty());
        node.config.kernel_sha256 = found;
        node.config.initrd_sha256 = zeros;
        assert!(node.error().contains("initrd_sha256"), "{}", node.error());
        node.config.initrd = "/no/such/initrd".into();
        assert!(node.error().contains("/no/such/initrd: No such file"), "{}", node.error());
    }

    #[test]
    fn copy_is_used_again_without_hashing() {
        let mut node = Node::new();
        node.config.initrd_sha256 = sha256(&node.config.initrd);
        assert_eq!(node.open().unwrap(), BOTH);
        let names = node.names();
        assert_eq!(names.len(), 2);
        // Change the copies, which only root can do. If the next `open` returns the changed bytes, the files were not
        // copied again.
        for name in &names {
            let path = node.copies().join(name);
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
            fs::write(path, "0123456789").unwrap();
        }
        assert_eq!(node.open().unwrap(), ["0123456789"; 2]);
        fs::write(node.copies().join(&names[0]), "short").unwrap();
        assert!(node.open().unwrap().iter().any(|text| BOTH.contains(&text.as_str())));
    }

    #[test]
    fn file_that_is_changed_in_place_is_refused_and_does_not_change_an_opened_copy() {
        let node = Node::new();
        let mut opened = GuestImages::open_with(&node.config, &node.copies()).unwrap().kernel;
        fs::write(&node.config.kernel, "the kermel").unwrap();
        // Set the file's time, because the file system's clock may be too coarse to distinguish the two writes.
        let file = File::options().write(true).open(&node.config.kernel).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let error = node.error();
        assert!(error.contains(&format!("found {}", sha256(&node.config.kernel))), "{error}");
        let mut text = String::new();
        opened.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the kernel");
        // A file with the right content is accepted again.
        fs::write(node.dir.path().join("new"), "the kernel").unwrap();
        fs::rename(node.dir.path().join("new"), &node.config.kernel).unwrap();
        assert_eq!(node.open().unwrap(), BOTH);
        assert_eq!(node.names().len(), 1);
    }

    #[test]
    fn copies_of_other_digests_are_removed() {
        let mut node = Node::new();
        node.open().unwrap();
        let old = node.names();
        fs::write(&node.config.kernel, "new kernel").unwrap();
        node.config.kernel_sha256 = sha256(&node.config.kernel);
        fs::write(node.copies().join("foreign"), "").unwrap();
        assert_eq!(node.open().unwrap(), ["new kernel", "the initrd"]);
        let new = node.names();
        assert!(new.len() == 1 && new != old && new[0].starts_with(&node.config.kernel_sha256), "{new:?}");
    }

    #[test]
    fn directory_that_others_can_access_is_not_used() {
        let mut node = Node::new();
        fs::create_dir(node.copies()).unwrap();
        let planted = copy_name(&node.config.kernel_sha256, &fs::metadata(&node.config.kernel).unwrap());
        fs::write(node.copies().join(planted), "0123456789").unwrap();
        let refuse = |node: &Node| {
            assert_eq!(node.open().unwrap(), BOTH);
            assert_eq!(node.names().len(), 1);
        };
        for mode in [0o755, 0o701, 0o770] {
            fs::set_permissions(node.copies(), PermissionsExt::from_mode(mode)).unwrap();
            refuse(&node);
        }
        // A symlink is refused even if its target is private, because the symlink could be replaced.
        fs::set_permissions(node.copies(), PermissionsExt::from_mode(0o700)).unwrap();
        fs::rename(node.copies(), node.memory.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", node.copies()).unwrap();
        refuse(&node);
        // The digest is checked even if the directory is not used.
        node.config.kernel_sha256 = "0".repeat(64);
        assert!(node.error().contains("expected SHA-256 000"));
    }

    #[test]
    fn directory_outside_a_tmpfs_is_not_used() {
        let mut node = Node::new();
        node.memory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(node.open().unwrap(), BOTH);
        assert!(node.names().is_empty());
    }
}
