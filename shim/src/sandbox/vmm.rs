//! The VMM process as the shim sees it: started, asked over its control socket, and noticed when it dies.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use husk_vmm::client::{self, SpawnError, SpawnOptions, Spawned};
use husk_vmm::control::{Answer, Call, Notice, Reply, Request, wire};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::lock;
use crate::spec::Network;

/// Why the VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process cannot be started.
    #[error("starting the VMM's process")]
    Spawn(#[source] SpawnError),
    /// Its descriptors cannot be watched.
    #[error("watching the VMM's process")]
    Watch(#[source] std::io::Error),
    /// The network namespace cannot be opened.
    #[error("opening the network namespace {path}")]
    Netns {
        /// The namespace.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The request cannot be written.
    #[error("sending a request to the VMM")]
    Send(#[source] std::io::Error),
    /// The VMM refused.
    #[error("{0}")]
    Refused(String),
    /// The VMM is no more.
    #[error("the VMM's process is gone")]
    Gone,
    /// The VMM answered something else than what was asked.
    #[error("the VMM's answer does not fit the request")]
    Unexpected,
}

type Pending = HashMap<u64, oneshot::Sender<Result<(Answer, Option<OwnedFd>), VmmError>>>;

struct Inner {
    control: AsyncFd<OwnedFd>,
    next: AtomicU64,
    /// None once the VMM is gone.
    pending: Mutex<Option<Pending>>,
    pid: u32,
    dead: watch::Receiver<Option<ExitStatus>>,
    many_files: Notify,
}

/// A handle of a running VMM process.
#[derive(Clone)]
pub struct Vmm {
    inner: Arc<Inner>,
}

/// Starts the VMM's process in the sandbox' network namespace. Call it from the main thread: the process dies with the
/// thread that started it.
///
/// # Errors
/// [`VmmError`] when namespace or process cannot be had.
pub fn spawn(network: &Network) -> Result<Spawned, VmmError> {
    let network = match network {
        Network::New => client::Network::New,
        Network::Path(path) => {
            let netns = std::fs::File::open(path)
                .map_err(|source| VmmError::Netns { path: path.display().to_string(), source })?;
            client::Network::Join(netns.into())
        }
    };
    client::spawn(SpawnOptions { network, ..Default::default() }).map_err(VmmError::Spawn)
}

/// Waits for a child that has ended or is about to.
fn reap(pid: u32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: waitpid writes the status of a child of this process that nobody else waits for.
    unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, 0) };
    ExitStatus::from_raw(status)
}

impl Vmm {
    /// Hands a started process to the runtime; what it says unasked goes to `notices`.
    ///
    /// # Errors
    /// [`VmmError::Watch`] when its descriptors cannot be watched; it has ended then.
    pub fn attach(spawned: Spawned, notices: mpsc::UnboundedSender<Notice>) -> Result<Self, VmmError> {
        let Spawned { pid, pidfd, control } = spawned;
        let watch = || -> std::io::Result<_> {
            nix::fcntl::fcntl(&control, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
            // SAFETY: an OwnedFd stays the same open descriptor until it is dropped, which deregisters it first.
            let watched =
                unsafe { (AsyncFd::register(control)?, AsyncFd::register_with_interest(pidfd, Interest::READABLE)?) };
            Ok(watched)
        };
        let (control, pidfd) = match watch() {
            Ok(fds) => fds,
            Err(error) => {
                // Its control socket is closed by now, which ends it.
                reap(pid);
                return Err(VmmError::Watch(error));
            }
        };
        let (died, dead) = watch::channel(None);
        let pending = Mutex::new(Some(Pending::new()));
        let inner = Arc::new(Inner { control, next: AtomicU64::new(1), pending, pid, dead, many_files: Notify::new() });
        let vmm = Self { inner: Arc::clone(&inner) };
        tokio::spawn(async move {
            read(&inner, &notices).await;
            // The socket's end comes with the process' end; what it said before has been read.
            lock(&inner.pending).take();
            drop(notices);
            let _ = pidfd.readable().await;
            died.send_replace(Some(reap(pid)));
        });
        Ok(vmm)
    }

    /// The process' pid: what the runtime reports as its tasks' pid.
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// A pid of the host's for one container alone; [`Vmm::give_back_pid`] follows.
    ///
    /// # Errors
    /// As [`Vmm::call`].
    pub async fn take_pid(&self) -> Result<u32, VmmError> {
        match self.call(Call::TakePid, &[]).await?.0 {
            Answer::Pid { pid } => Ok(pid),
            _ => Err(VmmError::Unexpected),
        }
    }

    /// The container is gone; so may be the VMM.
    pub async fn give_back_pid(&self, pid: u32) {
        if let Err(error) = self.call(Call::GiveBackPid { pid }, &[]).await {
            tracing::debug!(pid, %error, "pid not given back");
        }
    }

    /// Asks, and waits for the answer. The descriptors' numbers are their positions.
    ///
    /// # Errors
    /// [`VmmError`] when the VMM refuses, or is gone before it answered.
    pub async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Option<OwnedFd>), VmmError> {
        let seq = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let request = Request { seq, call };
        let (answer, wait) = oneshot::channel();
        lock(&self.inner.pending).as_mut().ok_or(VmmError::Gone)?.insert(seq, answer);
        let sent = self.inner.control.async_io(Interest::WRITABLE, |socket| wire::send(socket, &request, fds)).await;
        if let Err(error) = sent {
            let gone = error.kind() == std::io::ErrorKind::BrokenPipe;
            if let Some(pending) = lock(&self.inner.pending).as_mut() {
                pending.remove(&seq);
            }
            return Err(if gone { VmmError::Gone } else { VmmError::Send(error) });
        }
        wait.await.map_err(|_| VmmError::Gone)?
    }

    /// Connects to a vsock port of the guest.
    ///
    /// # Errors
    /// [`VmmError`] when the guest refuses, or the VMM is gone.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, VmmError> {
        match self.call(Call::Connect { port }, &[]).await? {
            (Answer::Connected, Some(fd)) => Ok(UnixStream::from(fd)),
            _ => Err(VmmError::Unexpected),
        }
    }

    /// Kills the process; [`Vmm::wait`] tells when it is gone.
    pub fn kill(&self) {
        if self.inner.dead.borrow().is_none()
            && let Ok(pid) = i32::try_from(self.inner.pid)
        {
            // Not reaped yet (the status is set right after), so the pid is still its own.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }

    /// Waits for the process' end.
    pub async fn wait(&self) -> ExitStatus {
        let mut dead = self.inner.dead.clone();
        match dead.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => ExitStatus::default(),
        }
    }

    /// Waits until the VMM has so many files open for the guest that this is to forget some.
    pub async fn many_files(&self) {
        self.inner.many_files.notified().await;
    }

    /// How the process ended, if it did.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.inner.dead.borrow()
    }
}

/// Reads replies until the socket ends.
async fn read(inner: &Inner, notices: &mpsc::UnboundedSender<Notice>) {
    loop {
        match inner.control.async_io(Interest::READABLE, |socket| wire::recv::<Reply>(socket)).await {
            Ok((Reply::Answer { seq, result }, fds)) => {
                let waiting = lock(&inner.pending).as_mut().and_then(|pending| pending.remove(&seq));
                if let Some(waiting) = waiting {
                    let result = result.map(|answer| (answer, fds.into_iter().next()));
                    let _ = waiting.send(result.map_err(VmmError::Refused));
                }
            }
            Ok((Reply::Notice(Notice::ManyFiles), _)) => inner.many_files.notify_one(),
            Ok((Reply::Notice(notice), _)) => drop(notices.send(notice)),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                tracing::warn!(%error, "the VMM said something unknown");
            }
            Err(error) => return tracing::debug!(%error, "the VMM's control socket ended"),
        }
    }
}
