//! Where a sandbox's shim listens: one socket per containerd, namespace and group.

use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where containerd's own shims keep their sockets.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// The socket of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    path: PathBuf,
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The directory cannot be made.
    #[error("making the socket directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The socket cannot be bound.
    #[error("binding {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What came of trying to listen.
#[derive(Debug)]
pub enum Listen {
    /// Nobody else is there.
    Bound(UnixListener),
    /// A live shim answers there.
    Taken,
}

impl Address {
    /// The address of `group` in `namespace` of the containerd at `containerd`.
    pub fn new(dir: Option<&str>, containerd: &str, namespace: &str, group: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(Path::new(containerd).join(namespace).join(group).as_os_str().as_encoded_bytes());
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: Path::new(dir.unwrap_or(SOCKET_DIR)).join(name) }
    }

    /// The address at a path found earlier.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let path = uri.trim().strip_prefix("unix://")?;
        path.starts_with('/').then(|| Self { path: path.into() })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As containerd wants it.
    pub fn uri(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Whether somebody listens.
    pub fn is_live(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// Binds the socket, in place of a dead one.
    ///
    /// # Errors
    /// [`ListenError`] when directory or socket cannot be made.
    pub fn listen(&self) -> Result<Listen, ListenError> {
        if let Some(dir) = self.path.parent() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(dir)
                .map_err(|source| ListenError::Directory { path: dir.into(), source })?;
        }
        let error = |source| ListenError::Bind { path: self.path.clone(), source };
        for _ in 0..3 {
            match UnixListener::bind(&self.path) {
                Ok(listener) => {
                    std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
                    return Ok(Listen::Bound(listener));
                }
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                    if self.is_live() {
                        return Ok(Listen::Taken);
                    }
                    self.remove();
                }
                Err(e) => return Err(error(e)),
            }
        }
        Err(error(std::io::ErrorKind::AddrInUse.into()))
    }

    /// Removes the socket, and nothing that is none.
    pub fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.file_type().is_socket()) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_per_group() {
        let a = Address::new(None, "/run/containerd/containerd.sock", "default", "a");
        assert_eq!(a, Address::new(None, "/run/containerd/containerd.sock", "default", "a"));
        assert_ne!(a, Address::new(None, "/run/containerd/containerd.sock", "default", "b"));
        assert_ne!(a, Address::new(None, "/run/containerd/containerd.sock", "k8s.io", "a"));
        assert_ne!(a, Address::new(None, "/run/other/containerd.sock", "default", "a"));
        assert!(a.uri().starts_with("unix:///run/containerd/s/"));
        assert_eq!(a.uri().len(), "unix:///run/containerd/s/".len() + 64);
        assert_eq!(Address::from_uri(&a.uri()), Some(a));
        assert_eq!(Address::from_uri("relative"), None);
    }

    #[test]
    fn live_sockets_are_kept_and_dead_ones_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(dir.path().to_str(), "c", "n", "g");
        let Listen::Bound(listener) = address.listen().unwrap() else { panic!("taken") };
        assert!(matches!(address.listen().unwrap(), Listen::Taken));
        drop(listener);
        assert!(!address.is_live());
        assert!(matches!(address.listen().unwrap(), Listen::Bound(_)));
        address.remove();
        assert!(!address.path().exists());
    }
}
