//! The shim's Unix socket. Each combination of containerd instance, namespace and sandbox has its own socket path.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use sha2::{Digest, Sha256};

/// Directory in which containerd's own shims create their sockets.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// The socket path of a sandbox's shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    path: PathBuf,
}

/// A failure to listen on the socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The directory cannot be created.
    #[error("failed to create the socket directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The directory cannot be locked.
    #[error("failed to lock the socket directory {path}")]
    Lock {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The socket cannot be bound, or its mode cannot be set.
    #[error("failed to create the socket {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// Result of [`Address::listen`].
#[derive(Debug)]
pub enum Listen {
    /// This process now listens on the socket.
    Bound(UnixListener),
    /// A live shim listens on the socket.
    InUse,
}

impl Address {
    /// Returns the address of the shim that serves `sandbox` in containerd's namespace `namespace`.
    ///
    /// `containerd` is the path of containerd's gRPC socket. If `dir` is `None`, the socket is in [`SOCKET_DIR`].
    pub fn new(dir: Option<&str>, containerd: &str, namespace: &str, sandbox: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(Path::new(containerd).join(namespace).join(sandbox).as_os_str().as_encoded_bytes());
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: Path::new(dir.unwrap_or(SOCKET_DIR)).join(name) }
    }

    /// Parses the URI in an `address` file. Returns `None` if `uri` is not `unix://` with an absolute path.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let path = uri.trim().strip_prefix("unix://")?;
        path.starts_with('/').then(|| Self { path: path.into() })
    }

    /// Returns the socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the address as a `unix://` URI, the form that containerd expects.
    pub fn uri(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Returns whether a process listens on the socket.
    pub fn is_live(&self) -> bool {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let connected = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .and_then(|socket| connect(socket.as_raw_fd(), &UnixAddr::new(&self.path)?));
        // EAGAIN means that a process listens, but the socket's backlog is full.
        matches!(connected, Ok(()) | Err(Errno::EAGAIN))
    }

    /// Creates the socket and listens on it. Replaces an existing socket only if no process listens on the existing
    /// socket.
    pub fn listen(&self) -> Result<Listen, ListenError> {
        let dir = self.path.parent().unwrap_or_else(|| Path::new("/"));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(|source| ListenError::Directory { path: dir.into(), source })?;
        // A `start` process removes a socket on which no process listens. Without the lock, a `start` process could
        // remove the new socket of another `start` process in two cases. First, no process listens on a new socket
        // between bind(2) and listen(2). Second, two processes could find the same dead socket: the slower process
        // could then remove the socket that the faster process has created. The lock is on the directory, because no
        // process would remove a separate lock file.
        let _lock = lock(dir).map_err(|source| ListenError::Lock { path: dir.into(), source })?;
        let error = |source| ListenError::Bind { path: self.path.clone(), source };
        for _ in 0..3 {
            match UnixListener::bind(&self.path) {
                Ok(listener) => {
                    std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o600))
                        .inspect_err(|_| self.remove())
                        .map_err(error)?;
                    return Ok(Listen::Bound(listener));
                }
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                    if self.is_live() {
                        return Ok(Listen::InUse);
                    }
                    self.remove();
                }
                Err(e) => return Err(error(e)),
            }
        }
        Err(error(std::io::ErrorKind::AddrInUse.into()))
    }

    /// Removes the socket. Does nothing if the path is not a socket.
    pub fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.file_type().is_socket()) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Locks a directory exclusively. The wait is short, because a process that holds this lock does not block.
fn lock(dir: &Path) -> std::io::Result<Flock<File>> {
    let mut file = File::open(dir)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => return Ok(lock),
            Err((returned, Errno::EINTR)) => file = returned,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn address_differs_between_containerd_instances_namespaces_and_sandboxes() {
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
    fn listen_keeps_live_sockets_and_replaces_dead_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(dir.path().to_str(), "c", "n", "g");
        let Listen::Bound(listener) = address.listen().unwrap() else { panic!("the new socket is already in use") };
        assert!(matches!(address.listen().unwrap(), Listen::InUse));
        drop(listener);
        assert!(!address.is_live());
        assert!(matches!(address.listen().unwrap(), Listen::Bound(_)));
        address.remove();
        assert!(!address.path().exists());
    }

    #[test]
    fn concurrent_starts_bind_the_socket_once() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let address = Address::new(dir.path().to_str(), "c", "n", &round.to_string());
            if round % 2 == 0 {
                // Leave a socket on which no process listens.
                drop(UnixListener::bind(address.path()).unwrap());
            }
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| address.listen().unwrap())).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| matches!(result, Listen::Bound(_))).count(), 1, "{round}");
            assert!(address.is_live());
        }
    }

    #[test]
    fn socket_with_a_full_backlog_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(dir.path().to_str(), "c", "n", "g");
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(address.path()).unwrap()).unwrap();
        assert!(!address.is_live());
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let _queued = UnixStream::connect(address.path()).unwrap();
        assert!(address.is_live());
    }
}
