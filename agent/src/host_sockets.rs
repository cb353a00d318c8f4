//! Guest side of connections to Unix sockets of the node.
//!
//! If a process of a container connects to a socket in the share to which no socket of this guest is bound, the guest's
//! kernel hands the connection to the agent (`husk_base::sys::unix_relay`). The agent asks the shim to connect, passes
//! the result to the waiting process, and relays the data.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_base::async_fd::register;
use husk_base::entropy;
use husk_base::relay::{self, Departure, Near};
use husk_base::sys::unix_relay::{self, Target};
use husk_proto::agent::HostSocket;
use husk_proto::host_socket::{MAX_CONNECTIONS, MAX_GROUPS, MAX_PATH};
use husk_proto::stream::AGENT_TOKEN;
use husk_proto::{GUEST_SHARE, SHARED_VOLUMES};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::events::EventHub;
use crate::io::streams::Streams;
use crate::vsock::{RETRY_DELAY, is_shortage};

/// Timeout for the shim's reply, after the shim has connected the stream.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Path of the listener, until it is registered. It is not an abstract address, because Landlock can forbid a process of
/// a container to connect to these (LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET).
const LISTENER: &str = "/run/husk/host-sockets";

/// Why the agent refuses a connection.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("the socket is not in a volume of the share")]
    NotInVolume,
    #[error("the path of the socket is longer than {MAX_PATH} bytes")]
    LongPath,
    #[error("the process has more than {MAX_GROUPS} supplementary groups")]
    ManyGroups,
    #[error("the process does not wait any longer")]
    Gone,
    #[error("failed to {0}")]
    Kernel(&'static str, #[source] io::Error),
    #[error(transparent)]
    Stream(#[from] crate::io::streams::StreamError),
    #[error("the shim did not reply within {} s", REPLY_TIMEOUT.as_secs())]
    Timeout,
    #[error("the shim refused the connection")]
    Refused(#[source] io::Error),
}

impl RelayError {
    /// Returns the error of the process's connect(2).
    fn errno(&self) -> i32 {
        match self {
            Self::Refused(source) => source.raw_os_error().unwrap_or(libc::EIO),
            Self::ManyGroups => libc::E2BIG,
            Self::Timeout => libc::ETIMEDOUT,
            _ => libc::ECONNREFUSED,
        }
    }
}

/// A connection whose client waits in connect(2). If dropped without an answer, connect(2) fails with ECONNREFUSED.
struct Waiting(OwnedFd);

impl Waiting {
    /// Makes connect(2) fail. The client's socket stays unconnected.
    fn refuse(&self, errno: i32) {
        // An error means that the client has gone.
        let _ = unix_relay::answer(self.0.as_fd(), husk_proto::host_socket::reply(errno));
    }

    /// Makes connect(2) succeed, and returns the agent's end of the connection.
    fn accept(self) -> io::Result<UnixStream> {
        unix_relay::answer(self.0.as_fd(), 0)?;
        UnixStream::from_std(self.0.into())
    }
}

/// Registers the relay with the guest's kernel, and serves its connections in a new task. If this fails, the kernel
/// refuses the connections.
pub fn start(hub: EventHub, streams: Streams) {
    match listen() {
        Ok(listener) => drop(tokio::spawn(serve(listener, hub, streams))),
        Err(error) => tracing::warn!("failed to register the relay to sockets of the node: {error}"),
    }
}

/// Creates the listener to which the guest's kernel hands connections. Without a name, it has no other clients.
fn listen() -> io::Result<AsyncFd<UnixListener>> {
    let listener = UnixListener::bind(LISTENER)?;
    fs::remove_file(LISTENER)?;
    unix_relay::register(listener.as_fd())?;
    listener.set_nonblocking(true)?;
    register(listener, Interest::READABLE)
}

/// Accepts connections until the listener fails.
async fn serve(listener: AsyncFd<UnixListener>, hub: EventHub, streams: Streams) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accept = |listener: &UnixListener| unix_relay::accept(listener.as_fd());
        let connection = match listener.async_io(Interest::READABLE, accept).await {
            Ok(connection) => Waiting(connection),
            Err(error) if is_shortage(&error) => {
                tokio::time::sleep(RETRY_DELAY).await;
                continue;
            }
            Err(error) => return tracing::error!("failed to accept a connection to a socket of the node: {error}"),
        };
        // A full backlog also makes connect(2) of a non-blocking socket fail with EAGAIN (unix(7)).
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!("refused a connection to a socket of the node: the pod has {MAX_CONNECTIONS}");
            connection.refuse(libc::EAGAIN);
            continue;
        };
        tokio::spawn(relay(connection, slot, hub.clone(), streams.clone()));
    }
}

async fn relay(connection: Waiting, slot: OwnedSemaphorePermit, hub: EventHub, streams: Streams) {
    let connected = match Departure::watch(&connection.0, Near::Client) {
        // A client that has gone needs no connection. The shim sees that the stream is closed.
        Ok(departure) => tokio::select! {
            connected = connect(&connection, &hub, &streams) => connected,
            _ = departure.wait() => Err(RelayError::Gone),
        },
        Err(error) => Err(RelayError::Kernel("watch a client", error)),
    };
    match connected {
        Ok(host) => match connection.accept() {
            // Fds that the client sends are not received, and the kernel closes them.
            Ok(client) => {
                if let Err(error) = relay::relay(client, host, Near::Client).await {
                    tracing::debug!("failed to relay a connection to a socket of the node: {error}");
                }
            }
            Err(error) => tracing::debug!("the client of a connection to a socket of the node has gone: {error}"),
        },
        Err(error) => {
            connection.refuse(error.errno());
            let error_text = husk_base::error::chain(&error);
            match error {
                RelayError::ManyGroups => {
                    tracing::warn!("refused a connection to a socket of the node: {error_text}");
                }
                _ => tracing::debug!("refused a connection to a socket of the node: {error_text}"),
            }
        }
    }
    drop(slot);
}

/// Asks the shim to connect to the socket of the node. Returns the stream of the connection.
async fn connect(connection: &Waiting, hub: &EventHub, streams: &Streams) -> Result<UnixStream, RelayError> {
    let duplicate = connection.0.as_fd().try_clone_to_owned();
    let duplicate = duplicate.map_err(|e| RelayError::Kernel("duplicate a connection", e))?;
    // Looks up the roots of volumes, on the file system of the socket, which the client has just looked up. If the host
    // hangs, the client's connect(2) hangs, as any lookup would. `slot` limits the number of these threads.
    let request = tokio::task::spawn_blocking(move || request(duplicate.as_fd())).await;
    let request = request.map_err(|e| RelayError::Kernel("run a thread", io::Error::other(e)))??;
    let token = request.token;
    hub.host_socket(request);
    // The table of streams has its own timeout.
    let stream = streams.take(&token.to_string()).await?.ok_or(RelayError::Timeout)?;
    let stream = OwnedFd::into(stream);
    let mut stream = UnixStream::from_std(stream).map_err(|e| RelayError::Kernel("register the stream", e))?;
    let reply = timeout(REPLY_TIMEOUT, stream.read_u8()).await.map_err(|_| RelayError::Timeout)?;
    match reply.map_err(|e| RelayError::Kernel("read the shim's reply", e))? {
        0 => Ok(stream),
        errno => Err(RelayError::Refused(io::Error::from_raw_os_error(errno.into()))),
    }
}

/// Returns the request to the shim for a connection.
fn request(socket: BorrowedFd<'_>) -> Result<HostSocket, RelayError> {
    let kernel = |step| move |error: io::Error| RelayError::Kernel(step, error);
    let target = unix_relay::target(socket, None).map_err(kernel("read the target of a connection"))?;
    let mounts = fs::read("/proc/self/mountinfo").map_err(kernel("read the agent's mounts"))?;
    let path_in = |volume: &Path| path_in_volume(socket, volume).ok();
    let (volume, path) = place(&target, &mounts, path_in).ok_or(RelayError::NotInVolume)?;
    if path.as_os_str().len() > MAX_PATH {
        return Err(RelayError::LongPath);
    }
    let peer = getsockopt(&socket, sockopt::PeerCredentials)
        .map_err(|error| RelayError::Kernel("read the credentials of a client", error.into()))?;
    let groups = unix_relay::peer_groups(socket, MAX_GROUPS).map_err(|error| match error.raw_os_error() {
        Some(libc::ERANGE) => RelayError::ManyGroups,
        _ => RelayError::Kernel("read the groups of a client", error),
    })?;
    let token = entropy::bytes().map_err(kernel("get a random token"))?;
    Ok(HostSocket {
        token: u64::from_ne_bytes(token) | AGENT_TOKEN,
        volume,
        path: path.as_os_str().as_bytes().to_vec(),
        uid: peer.uid(),
        gid: peer.gid(),
        groups,
        ..Default::default()
    })
}

/// Returns the volume of the share that contains `target`, and the path below the volume's root. `mounts` is the
/// agent's mount list. `path_in` returns the path below the root of a volume that is a mount.
///
/// A volume that is a directory is a mount of its own, which the guest's kernel automounts. Several volumes can be
/// mounts of one file system. A volume that is a socket belongs to the file system of the share itself.
fn place(target: &Target, mounts: &[u8], path_in: impl Fn(&Path) -> Option<PathBuf>) -> Option<(String, PathBuf)> {
    let volumes = Path::new(GUEST_SHARE).join(SHARED_VOLUMES);
    mount_points(mounts, target.device).find_map(|point| {
        if point == Path::new(GUEST_SHARE) {
            let below = target.path.strip_prefix("/").ok()?.strip_prefix(SHARED_VOLUMES).ok()?;
            let mut parts = below.components();
            let Some(Component::Normal(volume)) = parts.next() else { return None };
            return Some((volume.to_str()?.to_owned(), parts.as_path().to_owned()));
        }
        let volume = point.strip_prefix(&volumes).ok()?.to_str().filter(|name| !name.contains('/'))?;
        Some((volume.to_owned(), path_in(point)?.strip_prefix("/").ok()?.to_owned()))
    })
}

/// Returns the path of the socket below the root of a volume. Blocks the calling thread.
fn path_in_volume(socket: BorrowedFd<'_>, volume: &Path) -> io::Result<PathBuf> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let root = OpenOptions::new().read(true).custom_flags(flags).open(volume)?;
    Ok(unix_relay::target(socket, Some(root.as_fd()))?.path)
}

/// Returns the mount points of a file system.
fn mount_points(mounts: &[u8], (major, minor): (u32, u32)) -> impl Iterator<Item = &Path> {
    let device = format!("{major}:{minor}");
    mounts.split(|byte| *byte == b'\n').filter_map(move |line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (found, _root, point) = (fields.next()?, fields.next()?, fields.next()?);
        // The names in the share contain no character that the kernel escapes.
        (found == device.as_bytes()).then(|| Path::new(std::ffi::OsStr::from_bytes(point)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"22 21 0:20 / /run rw - tmpfs tmpfs rw\n\
        23 22 0:30 / /run/husk/share rw - virtiofs husk rw\n\
        24 23 0:31 / /run/husk/share/.volumes/0-w0.1-2-3-1 rw - virtiofs husk rw\n\
        25 23 0:32 / /run/husk/share/c1/rootfs rw - virtiofs husk rw\n\
        26 22 0:31 /part /run/husk/subpaths/c1/3 rw - virtiofs husk rw\n\
        27 24 0:33 / /run/husk/share/.volumes/0-w0.1-2-3-1/nested rw - virtiofs husk rw\n\
        28 23 0:31 /part /run/husk/share/.volumes/1-w0.1-9-3-1 rw - virtiofs husk rw\n";

    fn of(minor: u32, path: &str, roots: &[(&str, &str)]) -> Option<(String, PathBuf)> {
        let path_in = |volume: &Path| {
            let root = roots.iter().find(|(name, _)| volume == Path::new("/run/husk/share/.volumes").join(name))?;
            Some(PathBuf::from(root.1))
        };
        place(&Target { device: (0, minor), path: path.into() }, MOUNTS, path_in)
    }

    #[test]
    fn place_finds_sockets_in_volumes_only() {
        let in_volume = |name: &str, path: &str| Some((name.to_owned(), PathBuf::from(path)));
        let (first, second) = ("0-w0.1-2-3-1", "1-w0.1-9-3-1");
        assert_eq!(of(31, "/part/a/socket", &[(first, "/part/a/socket")]), in_volume(first, "part/a/socket"));
        // The mounts of one file system need not have a common root.
        assert_eq!(of(31, "/a/socket", &[(second, "/a/socket")]), in_volume(second, "a/socket"));
        assert_eq!(of(30, "/.volumes/7.1-2-3-1", &[]), in_volume("7.1-2-3-1", ""));
        for (minor, path) in [(31, "/a"), (32, "/tmp/socket"), (33, "/s"), (20, "/s"), (30, "/c1"), (30, "/.volumes")] {
            assert_eq!(of(minor, path, &[]), None, "{minor} {path}");
        }
    }

    #[test]
    fn mount_points_skips_malformed_lines() {
        assert_eq!(mount_points(b"\n1 2 0:31\n1 2 0:31 /\n", (0, 31)).count(), 0);
    }
}
