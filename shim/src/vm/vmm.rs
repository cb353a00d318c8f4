//! Client of the VMM: sends requests over the control socket, and waits until the process exits.

use std::collections::HashMap;
use std::convert::identity;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::async_fd::register;
use husk_base::sys::{process, scm_rights};
use husk_config::{BaseTimeout, TimeoutFactor};
use husk_vmm::client::{SpawnError, Spawned};
use husk_vmm::config::NetConfig;
use husk_vmm::control::{Answer, Call, Notice, Reply, Request, wire};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::blocking;
use crate::launcher::LaunchError;
use crate::lock;
use crate::vm::thread_id;
use crate::vm::throttle::Budget;
use crate::vm::vhost::{self, VhostPermits};

/// Bytes that each packet counts in addition to its length. They stand for the buffer and the system calls that the
/// packet needs, and limit the rate of the shortest packets to about 1000 a second. A VMM that is not hostile sends one
/// packet for each call of the shim, and a few notices.
const PACKET_BYTES: usize = 1 << 10;
/// Additional bytes that a packet with fds counts. The kernel drops up to 253 fds for such a packet.
const FDS_BYTES: usize = 64 << 10;

/// Timeout of calls that do not depend on the progress of the guest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of the calls that create and start the VM, and of requests for memory. The maximum of `start_timeout_secs`
/// is equal.
const SLOW_ANSWER_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long the VMM process may take to exit after SIGKILL. A thread that waits in a file system of the host that hangs
/// exits only when the wait ends. The shim then leaves the process to the kernel.
pub const VMM_EXIT_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(1);
/// Timeout for the VMM's answer to Inspect. The VMM itself waits for one second.
pub const INSPECT_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(2);

/// Error from starting or calling the VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process cannot be started.
    #[error("failed to start the VMM process")]
    Spawn(#[source] SpawnError),
    /// The launcher cannot start the process.
    #[error(transparent)]
    Launch(LaunchError),
    /// The VMM's fds cannot be registered with the async runtime.
    #[error("failed to watch the VMM process")]
    Watch(#[source] std::io::Error),
    /// The network namespace cannot be created.
    #[error("failed to create the pod's network namespace")]
    NewNetns(#[source] std::io::Error),
    /// The namespace cannot be opened.
    #[error("failed to open the namespace {path}")]
    Netns {
        /// Path of the namespace.
        path: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The sockets of a connection to the guest cannot be created.
    #[error("failed to create a socket pair for a connection to the guest")]
    Socket(#[source] std::io::Error),
    /// The request cannot be sent.
    #[error("failed to send a request to the VMM")]
    Send(#[source] std::io::Error),
    /// The VMM rejected the request. The text is the VMM's error.
    #[error("{0}")]
    Refused(String),
    /// The VMM has ended.
    #[error("the VMM process has ended")]
    Gone,
    /// The VMM reported a thread for the container, but the thread's PID on the host cannot be determined.
    #[error("failed to determine the host PID of the VMM thread that represents the container")]
    Thread(#[source] std::io::Error),
    /// vhost-net cannot be opened.
    #[error("failed to open {}: run `modprobe vhost_net`, or set vhost_net = false", vhost::DEVICE)]
    Vhost(#[source] std::io::Error),
    /// The VMM does not answer.
    #[error("the VMM did not answer the request {request} within {} s", limit.as_secs())]
    Timeout {
        /// Name of the request.
        request: &'static str,
        /// The timeout.
        limit: Duration,
    },
    /// The VMM's answer does not match the request.
    #[error("the VMM's answer does not match the request")]
    Unexpected,
}

type PendingCalls = HashMap<u64, oneshot::Sender<Result<Answer, VmmError>>>;

struct Inner {
    control: AsyncFd<OwnedFd>,
    next: AtomicU64,
    /// Calls that wait for an answer, by sequence number. `None` after the VMM has closed the control socket.
    pending: Mutex<Option<PendingCalls>>,
    pid: u32,
    dead: watch::Receiver<Option<ExitStatus>>,
    /// When the shim sent SIGKILL to the process, if it has.
    killed: watch::Sender<Option<Instant>>,
    fd_shortage: Notify,
    vhost: VhostPermits,
    factor: TimeoutFactor,
    /// For each container, the VMM has a thread. The shim reports the thread's id on the host to containerd as the
    /// container's PID. Maps this PID to the thread's id in the VMM's PID namespace.
    threads: Mutex<HashMap<u32, u32>>,
}

/// A call that waits for its answer. When the caller stops waiting, the VMM's answer is ignored. Therefore, a VMM that
/// does not answer cannot make the shim keep the calls whose time is over.
struct PendingCall<'a> {
    inner: &'a Inner,
    seq: u64,
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        if let Some(pending) = lock(&self.inner.pending).as_mut() {
            pending.remove(&self.seq);
        }
    }
}

/// A handle to a VMM process.
#[derive(Clone)]
pub struct Vmm {
    inner: Arc<Inner>,
}

/// A VMM whose end a test decides.
#[cfg(test)]
pub struct ScriptedVmm {
    /// The handle that the shim gets.
    pub vmm: Vmm,
    /// Is set when the shim kills the VMM.
    pub killed: watch::Receiver<Option<Instant>>,
    /// Takes the exit status.
    pub died: watch::Sender<Option<ExitStatus>>,
}

/// Waits until the child `pid` exits, and returns its exit status. Blocks the calling thread.
fn reap(pid: u32) -> ExitStatus {
    // The wait does not fail, because no other code waits for this child.
    let status = process::wait(pid.cast_signed(), 0).ok().flatten().map_or(0, |(_, status)| status);
    ExitStatus::from_raw(status)
}

impl Vmm {
    /// Registers the fds of a started VMM with the async runtime. Forwards the VMM's notices to `notices`. `factor` is
    /// the node's factor.
    ///
    /// # Errors
    /// [`VmmError::Watch`] if the fds cannot be registered. This function waits until the process has exited
    /// before it returns the error.
    pub fn attach(spawned: Spawned, notices: mpsc::Sender<Notice>, factor: TimeoutFactor) -> Result<Self, VmmError> {
        let Spawned { pid, pidfd, control } = spawned;
        let watch = || -> std::io::Result<_> {
            nix::fcntl::fcntl(&control, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
            let watched =
                (register(control, Interest::READABLE | Interest::WRITABLE)?, register(pidfd, Interest::READABLE)?);
            Ok(watched)
        };
        let (control, pidfd) = match watch() {
            Ok(fds) => fds,
            Err(error) => {
                // The failed call of `watch` has closed the control socket. Without this socket, the VMM exits.
                reap(pid);
                return Err(VmmError::Watch(error));
            }
        };
        let (died, dead) = watch::channel(None);
        let vmm = Self::new(control, pid, dead, factor);
        let inner = Arc::clone(&vmm.inner);
        tokio::spawn(async move {
            read_all(&inner, notices).await;
            // A VMM closes its socket only when it exits. A VMM that runs on is hostile, and no call can reach it.
            Self { inner }.kill();
            let _ = pidfd.readable().await;
            died.send_replace(Some(reap(pid)));
        });
        Ok(vmm)
    }

    fn new(
        control: AsyncFd<OwnedFd>,
        pid: u32,
        dead: watch::Receiver<Option<ExitStatus>>,
        factor: TimeoutFactor,
    ) -> Self {
        // The error is ignored. On older kernels, which lack the option, the kernel drops the fds at each read.
        let _ = scm_rights::accept_fds(control.get_ref(), false);
        let inner = Inner {
            control,
            next: AtomicU64::new(1),
            pending: Mutex::new(Some(PendingCalls::new())),
            pid,
            dead,
            killed: watch::Sender::new(None),
            fd_shortage: Notify::new(),
            vhost: VhostPermits::default(),
            factor,
            threads: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Starts to read from a non-blocking control socket whose other end answers in the place of a VMM. The shim's own
    /// process counts as the VMM.
    ///
    /// # Errors
    /// If the socket cannot be registered with the async runtime.
    #[cfg(any(test, feature = "testing"))]
    pub fn over(control: OwnedFd, notices: mpsc::Sender<Notice>) -> std::io::Result<Self> {
        let (_, dead) = watch::channel(None);
        let control = register(control, Interest::READABLE | Interest::WRITABLE)?;
        let vmm = Self::new(control, std::process::id(), dead, TimeoutFactor::default());
        let inner = Arc::clone(&vmm.inner);
        tokio::spawn(async move { read_all(&inner, notices).await });
        Ok(vmm)
    }

    /// Returns a VMM whose end the caller decides. The other end of the control socket answers in the VMM's place.
    ///
    /// # Errors
    /// If the socket cannot be registered with the async runtime.
    #[cfg(test)]
    pub fn scripted(control: OwnedFd, notices: mpsc::Sender<Notice>) -> std::io::Result<ScriptedVmm> {
        let (died, dead) = watch::channel(None);
        // No process has this PID, and `kill` sends no signal to it.
        let control = register(control, Interest::READABLE | Interest::WRITABLE)?;
        let vmm = Self::new(control, u32::MAX, dead, TimeoutFactor::default());
        let killed = vmm.inner.killed.subscribe();
        let inner = Arc::clone(&vmm.inner);
        tokio::spawn(async move {
            read_all(&inner, notices).await;
            Self { inner }.kill();
        });
        Ok(ScriptedVmm { vmm, killed, died })
    }

    /// Returns the PID of the process.
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// Acquires a PID on the host for one container. The caller must later call [`Vmm::release_pid`].
    ///
    /// # Errors
    /// The errors of [`Vmm::call`], and [`VmmError::Thread`].
    pub async fn acquire_pid(&self) -> Result<u32, VmmError> {
        let Answer::Pid { pid: inner } = self.call(Call::AcquirePid, &[]).await? else {
            return Err(VmmError::Unexpected);
        };
        let vmm = self.inner.pid;
        let found = blocking::spawn(move || thread_id::on_host(vmm, inner)).await;
        let pid = match found.and_then(identity) {
            Ok(pid) => pid,
            Err(error) => {
                // Best effort. The caller gets the error from `thread_id::on_host`.
                let _ = self.call(Call::ReleasePid { pid: inner }, &[]).await;
                return Err(VmmError::Thread(error));
            }
        };
        lock(&self.inner.threads).insert(pid, inner);
        Ok(pid)
    }

    /// Releases a PID that [`Vmm::acquire_pid`] returned. Best effort, because the VMM may have exited.
    pub async fn release_pid(&self, pid: u32) {
        let Some(inner) = lock(&self.inner.threads).remove(&pid) else { return };
        if let Err(error) = self.call(Call::ReleasePid { pid: inner }, &[]).await {
            tracing::debug!(pid, %error, "failed to release a PID");
        }
    }

    /// Permits vhost-net for an interface if `net.vhost` is true. The VMM requests vhost-net when the interface has
    /// much traffic.
    pub fn allow_vhost(&self, net: &NetConfig) {
        self.inner.vhost.allow(net);
    }

    /// Undoes [`Vmm::allow_vhost`] for an interface that has been removed from the VM.
    pub fn revoke_vhost(&self, mac: [u8; 6]) {
        self.inner.vhost.revoke(mac);
    }

    /// Starts a task that opens vhost-net for an interface and passes the fds to the VMM. If the interface has no
    /// permit, only logs a warning.
    fn start_vhost(&self, mac: [u8; 6]) {
        let Some(pairs) = self.inner.vhost.take(mac) else {
            let mac = format!("{mac:02x?}");
            return tracing::warn!(mac, "ignored the VMM's request for vhost-net for an interface that has no permit");
        };
        let vmm = self.clone();
        tokio::spawn(async move {
            if let Err(error) = vmm.pass_vhost(mac, pairs).await {
                let (error, mac) = (crate::chain(&error), format!("{mac:02x?}"));
                tracing::warn!(
                    mac,
                    error,
                    "failed to start vhost-net for an interface; the VMM continues to transfer the interface's frames"
                );
            }
        });
    }

    async fn pass_vhost(&self, mac: [u8; 6], pairs: usize) -> Result<(), VmmError> {
        let files = vhost::open(pairs).await.map_err(VmmError::Vhost)?;
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.call(Call::StartVhost { mac }, &fds).await.map(drop)
    }

    /// Sends a request and waits for the answer. An [`FdIndex`](husk_vmm::config::FdIndex) in the request is an index
    /// into `fds`.
    ///
    /// # Errors
    /// [`VmmError`] if the VMM rejects the request, does not answer, or exits before it answers.
    pub async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Answer, VmmError> {
        let limit = match call {
            // The callers of the boot and of a growth have timeouts of their own. The guest decides when it unplugs
            // memory.
            Call::Create(_) | Call::Resume | Call::RequestMemory { .. } => SLOW_ANSWER_TIMEOUT,
            Call::Inspect => self.timeout(INSPECT_TIMEOUT),
            _ => ANSWER_TIMEOUT,
        };
        let request = call.name();
        let answer = tokio::time::timeout(limit, self.answer(call, fds)).await;
        answer.map_err(|_| VmmError::Timeout { request, limit })?
    }

    /// Sends a request and waits for the answer without a timeout.
    async fn answer(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Answer, VmmError> {
        let seq = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let request = Request { seq, call };
        let (answer, wait) = oneshot::channel();
        lock(&self.inner.pending).as_mut().ok_or(VmmError::Gone)?.insert(seq, answer);
        let _pending = PendingCall { inner: &self.inner, seq };
        self.inner.control.async_io(Interest::WRITABLE, |socket| wire::send(socket, &request, fds)).await.map_err(
            |error| match error.kind() {
                std::io::ErrorKind::BrokenPipe => VmmError::Gone,
                _ => VmmError::Send(error),
            },
        )?;
        wait.await.map_err(|_| VmmError::Gone)?
    }

    /// Connects to a vsock port of the guest. The VMM gets one end of a new socket pair, and copies data between this
    /// end and the guest.
    ///
    /// # Errors
    /// [`VmmError`] if the guest refuses the connection, or the VMM has exited. [`VmmError::Socket`] if the shim has no
    /// free fds.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, VmmError> {
        let (ours, theirs) = UnixStream::pair().map_err(VmmError::Socket)?;
        // The error is ignored. On older kernels, which lack the option, the kernel drops the fds at each read.
        let _ = scm_rights::accept_fds(&ours, false);
        match self.call(Call::Connect { port }, &[theirs.as_fd()]).await? {
            Answer::Connected => Ok(ours),
            _ => Err(VmmError::Unexpected),
        }
    }

    /// Sends SIGKILL to the process. Does not wait until the process exits.
    pub fn kill(&self) {
        if self.inner.dead.borrow().is_none()
            && let Ok(pid) = i32::try_from(self.inner.pid)
        {
            // Until the process is reaped, the PID belongs to the VMM. `dead` is set immediately after the reaping.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        self.inner.killed.send_if_modified(|killed| {
            let first = killed.is_none();
            killed.get_or_insert_with(Instant::now);
            first
        });
    }

    /// Returns a timeout of this node.
    pub fn timeout(&self, base: BaseTimeout) -> Duration {
        self.inner.factor.of(base)
    }

    /// Returns whether the shim has sent SIGKILL to the process.
    pub fn is_killed(&self) -> bool {
        self.inner.killed.borrow().is_some()
    }

    /// Waits until the process exits. Returns the exit status.
    pub async fn wait(&self) -> ExitStatus {
        let mut dead = self.inner.dead.clone();
        match dead.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => ExitStatus::default(),
        }
    }

    /// Waits until the process exits, and returns the exit status. Returns `None` if the process has not exited
    /// [`VMM_EXIT_TIMEOUT`] after [`Vmm::kill`].
    pub async fn wait_exit_or_give_up(&self) -> Option<ExitStatus> {
        let give_up = async {
            let mut killed = self.inner.killed.subscribe();
            // The wait does not fail, because `inner` owns the sender.
            let at = killed.wait_for(Option::is_some).await.map_or(None, |at| *at);
            tokio::time::sleep_until(at.unwrap_or_else(Instant::now) + self.timeout(VMM_EXIT_TIMEOUT)).await;
        };
        tokio::select! {
            biased;
            status = self.wait() => Some(status),
            () = give_up => None,
        }
    }

    /// Waits until the VMM reports that it has nearly reached its fd limit. When the guest drops its caches, the VMM
    /// can close files.
    pub async fn wait_for_fd_shortage(&self) {
        self.inner.fd_shortage.notified().await;
    }

    /// Returns whether the VMM has closed the control socket, as it does when the process exits.
    pub fn is_closed(&self) -> bool {
        lock(&self.inner.pending).is_none()
    }

    /// Returns the exit status, if the process has exited.
    pub fn ended(&self) -> Option<ExitStatus> {
        *self.inner.dead.borrow()
    }
}

/// Reads until the socket is closed. Then ends all calls that wait for an answer.
async fn read_all(inner: &Arc<Inner>, notices: mpsc::Sender<Notice>) {
    read(inner, &notices).await;
    // The VMM has closed the socket. Therefore, no further answer can arrive.
    lock(&inner.pending).take();
}

/// Reads answers and notices until the socket is closed. Reads at a limited rate, because a VMM that its guest has
/// taken over may send packets without a pause. The VMM then has to wait, because its end of the socket is full.
async fn read(inner: &Arc<Inner>, notices: &mpsc::Sender<Notice>) {
    let mut budget = Budget::new();
    loop {
        budget.wait().await;
        let packet = match inner.control.async_io(Interest::READABLE, |socket| wire::receive_bytes(socket)).await {
            Ok(packet) => packet,
            Err(error) => return tracing::debug!(%error, "the VMM's control socket is closed"),
        };
        budget.take(PACKET_BYTES + packet.len());
        if packet.lost_fds() {
            budget.take(FDS_BYTES);
            tracing::warn!("dropped fds that the VMM sent; a VMM sends fds only if its guest has taken it over");
        }
        match packet.decode::<Reply>() {
            Ok((Reply::Answer { seq, result }, _)) => {
                let waiting = lock(&inner.pending).as_mut().and_then(|pending| pending.remove(&seq));
                if let Some(waiting) = waiting {
                    let _ = waiting.send(result.map_err(VmmError::Refused));
                }
            }
            Ok((Reply::Notice(Notice::FdShortage), _)) => inner.fd_shortage.notify_one(),
            Ok((Reply::Notice(Notice::VhostRequested { mac }), _)) => {
                Vmm { inner: Arc::clone(inner) }.start_vhost(mac);
            }
            Ok((Reply::Notice(notice), _)) => drop(notices.send(notice).await),
            Err(error) => tracing::warn!(%error, "the VMM sent an unknown message"),
        }
    }
}

#[cfg(test)]
#[path = "hostile_vmm_tests.rs"]
mod hostile_vmm_tests;
