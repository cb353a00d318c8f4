//! Connects processes of containers to Unix sockets of the node, if the configuration allows it.
//!
//! The agent asks for a connection with an event (`husk_proto::host_socket`). A process of its own connects and relays
//! the data ([`program`]).

mod find;
pub mod program;
mod rate;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use husk_base::relay::Near;
use husk_base::sync::lock;
use husk_config::host_sockets;
use husk_proto::host_socket::{MAX_CONNECTIONS, reply};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::blocking;
use crate::host_view;
use crate::launcher::{LaunchError, Launcher, Program, StartCgroup};
use crate::oci::IdMappings;
use crate::resources::cgroup::Cgroup;
use crate::sandbox::{Sandbox, StreamError};
use crate::vm::host_socket::{Credentials, HostSocketRequest};
use find::{FindError, Found};
use rate::Rate;

/// Timeout for everything before connect(2): the stream to the agent, the lookup of the socket, and the start of the
/// program.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a request waits for a slot, and for its turn.
const SLOT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of lookups at the same time. A lookup in a file system that hangs keeps one of the shim's blocking
/// threads, and other requests need these threads.
const MAX_LOOKUPS: usize = 4;
/// How long the refusal of a socket is not logged again.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of sockets whose refusals are logged within [`LOG_INTERVAL`].
const MAX_LOGGED: usize = 16;

/// Which sockets of the node the pod's containers may connect to, and the connections.
#[derive(Debug)]
pub struct HostSockets {
    /// The pod, for the log.
    pod: String,
    /// The list of the configuration.
    allowed: Vec<String>,
    /// Id mappings of the pod's user namespace.
    id_mappings: Option<IdMappings>,
    /// Limits the requests of the agent, including those that wait for a slot.
    requests: Arc<Semaphore>,
    /// Limits the connections.
    slots: Arc<Semaphore>,
    /// Limits the lookups.
    lookups: Arc<Semaphore>,
    /// Limits the rate of lookups and of started processes.
    rate: Mutex<Rate>,
    refused: Mutex<Refused>,
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("the configuration does not allow the socket")]
    NotAllowed,
    #[error("the ids {0:?} are not in the pod's user namespace")]
    Unmapped(Credentials),
    #[error("failed to {0}")]
    Step(&'static str, #[source] io::Error),
    #[error("failed to start the program that connects")]
    Launch(#[from] LaunchError),
    #[error("the pod has {MAX_CONNECTIONS} connections, or has made too many within a short time")]
    Busy,
    #[error("the process does not wait any longer")]
    Gone,
    #[error("the socket could not be prepared within {} s", PREPARE_TIMEOUT.as_secs())]
    Timeout,
}

impl ConnectError {
    /// Returns the error of the process's connect(2). A refusal has the error of a socket without a listener, because
    /// many programs take this error as the sign that nobody uses the socket.
    fn errno(&self) -> i32 {
        match self {
            Self::Timeout => libc::ETIMEDOUT,
            Self::Busy => libc::EAGAIN,
            // The pod's cgroup has no free pid.
            Self::Launch(LaunchError::Execute(source)) if source.raw_os_error() == Some(libc::EAGAIN) => libc::EAGAIN,
            Self::Unmapped(_) => libc::EACCES,
            _ => libc::ECONNREFUSED,
        }
    }
}

impl Default for HostSockets {
    /// Returns a value that allows no socket.
    fn default() -> Self {
        Self::new(String::new(), Vec::new(), None)
    }
}

impl HostSockets {
    /// Returns a value without connections.
    pub fn new(pod: String, allowed: Vec<String>, id_mappings: Option<IdMappings>) -> Self {
        let limits = [2 * MAX_CONNECTIONS, MAX_CONNECTIONS, MAX_LOOKUPS];
        let [requests, slots, lookups] = limits.map(|max| Arc::new(Semaphore::new(max)));
        let (rate, refused) = (Mutex::default(), Mutex::default());
        Self { pod, allowed, id_mappings, requests, slots, lookups, rate, refused }
    }

    /// Returns the list of the configuration.
    pub fn allowed(&self) -> &[String] {
        &self.allowed
    }

    /// Returns the socket, if the configuration allows the connection. Blocks the calling thread.
    fn find(&self, share: &Path, request: &HostSocketRequest) -> Result<OwnedFd, ConnectError> {
        let host = host_view::of_process();
        self.check(&request.credentials)?;
        let found = find::find(share, &request.volume, &request.path, host)?;
        match found.allowed_path(host, |path| host_sockets::allow(&self.allowed, path)) {
            Ok(Some(_)) => Ok(found.file),
            Ok(None) => {
                self.log_refusal(&found);
                Err(ConnectError::NotAllowed)
            }
            Err(error) => Err(ConnectError::Step("stat the socket on the node", error)),
        }
    }

    /// Checks that the pod's processes can have the credentials. A pod without a user namespace can have any.
    fn check(&self, credentials: &Credentials) -> Result<(), ConnectError> {
        let Some(id_mappings) = &self.id_mappings else { return Ok(()) };
        let mapped = id_mappings.has_host_uid(credentials.uid)
            && id_mappings.has_host_gid(credentials.gid)
            && credentials.groups.iter().all(|group| id_mappings.has_host_gid(*group));
        if mapped { Ok(()) } else { Err(ConnectError::Unmapped(credentials.clone())) }
    }

    /// Waits for a slot, and until the rate allows another connection.
    async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        let slot = async {
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
            let wait = lock(&self.rate).reserve(Instant::now(), SLOT_TIMEOUT)?;
            tokio::time::sleep(wait).await;
            Some(slot)
        };
        tokio::time::timeout(SLOT_TIMEOUT, slot).await.ok()?
    }

    fn log_refusal(&self, found: &Found) {
        let Some(path) = found.shortest_path() else { return };
        if lock(&self.refused).is_new(path, Instant::now()) {
            tracing::warn!(
                pod = self.pod,
                socket = %path.display(),
                "refused a connection of a container to a socket of the node: to allow it, add the path to \
                 host_sockets in {}",
                husk_config::DEFAULT_PATH
            );
        }
    }
}

/// Sockets whose refusals were logged, with the times.
#[derive(Debug, Default)]
struct Refused(Vec<(PathBuf, Instant)>);

impl Refused {
    /// Returns whether to log a refusal of `path`.
    fn is_new(&mut self, path: &Path, now: Instant) -> bool {
        self.0.retain(|(_, at)| now.saturating_duration_since(*at) < LOG_INTERVAL);
        if self.0.len() >= MAX_LOGGED || self.0.iter().any(|(logged, _)| logged == path) {
            return false;
        }
        self.0.push((path.to_owned(), now));
        true
    }
}

impl Sandbox {
    /// Returns the sockets of the node that the pod may use, or `None` if the sandbox was not launched.
    pub fn host_sockets(&self) -> Option<Arc<HostSockets>> {
        Some(Arc::clone(&self.launched.get()?.host_sockets))
    }

    /// Connects a process of a container to a socket of the node, in a new task.
    pub fn connect_host_socket(self: &Arc<Self>, request: HostSocketRequest, launcher: &Launcher) {
        let Some(sockets) = self.host_sockets() else { return };
        let Some(vmm) = self.vmm().cloned() else { return };
        // The agent itself allows no more than MAX_CONNECTIONS at the same time.
        let Ok(waiting) = Arc::clone(&sockets.requests).try_acquire_owned() else {
            return tracing::warn!("the agent asked for too many connections to sockets of the node");
        };
        let (sandbox, launcher) = (Arc::clone(self), launcher.clone());
        tokio::spawn(async move {
            let relay = async {
                // The agent stops waiting, too. A request that waited longer would connect for nobody.
                let slot = sockets.slot().await.map(Arc::new);
                if let Err(error) = sandbox.relay(request, sockets, &launcher, slot.clone()).await {
                    tracing::debug!(error = %crate::chain(&error), "refused a connection to a socket of the node");
                }
                drop((waiting, slot));
            };
            tokio::select! {
                () = relay => {}
                _ = vmm.wait() => {}
            }
        });
    }

    /// Runs until the connection ends. A lookup that hangs keeps `slot`. Refuses the connection if there is no slot.
    async fn relay(
        &self,
        request: HostSocketRequest,
        sockets: Arc<HostSockets>,
        launcher: &Launcher,
        slot: Option<impl Send + 'static>,
    ) -> Result<(), ConnectError> {
        let stream = tokio::time::timeout(PREPARE_TIMEOUT, self.open_stream_with(request.token));
        let mut stream = stream.await.map_err(|_| ConnectError::Timeout)??;
        let start = async {
            let slot = slot.ok_or(ConnectError::Busy)?;
            let (share, credentials) = (self.share(), request.credentials.clone());
            let lookup = Arc::clone(&sockets.lookups).acquire_owned().await;
            let socket = blocking::spawn(move || {
                let found = sockets.find(&share, &request);
                drop((slot, lookup));
                found
            });
            let socket = socket.await.map_err(|error| ConnectError::Step("look up the socket", error))??;
            if Near::Relay.is_gone(stream.as_fd()) {
                return Err(ConnectError::Gone);
            }
            self.start_relay(&stream, &socket, &credentials, launcher).await
        };
        let started = tokio::time::timeout(PREPARE_TIMEOUT, start).await.unwrap_or(Err(ConnectError::Timeout));
        match started {
            Ok(program) => {
                // The program has its own copy, and sees the end of the stream only if there is no other copy.
                drop(stream);
                let _ = program.wait().await;
                Ok(())
            }
            Err(error) => {
                let _ = stream.write_u8(reply(error.errno())).await;
                Err(error)
            }
        }
    }

    async fn start_relay(
        &self,
        stream: &UnixStream,
        socket: &OwnedFd,
        credentials: &Credentials,
        launcher: &Launcher,
    ) -> Result<Program, ConnectError> {
        let cgroup = self.cgroup().map(start_cgroup).transpose();
        let cgroup = cgroup.map_err(|error| ConnectError::Step("open the sandbox's cgroup", error))?;
        let null = File::options().write(true).open("/dev/null");
        let null = null.map_err(|error| ConnectError::Step("open /dev/null", error))?;
        let (args, fds) = (program::args(credentials), [stream.as_fd(), socket.as_fd(), null.as_fd()]);
        let options = program::options(&args, &fds, cgroup.as_ref());
        Ok(launcher.start_program(&options).await?)
    }
}

fn start_cgroup(cgroup: &Cgroup) -> io::Result<StartCgroup> {
    match cgroup.open_directory()? {
        Some(directory) => Ok(StartCgroup::V2(directory)),
        None => cgroup.open_procs().map(StartCgroup::V1),
    }
}

#[cfg(test)]
mod tests;
