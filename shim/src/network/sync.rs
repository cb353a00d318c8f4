//! Applies changes of the pod's network to the guest while the VM runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::async_fd::register;
use husk_proto::agent::{BindDeviceRequest, UnbindDeviceRequest};
use husk_vmm::config::{FdIndex, NetConfig};
use husk_vmm::control::{Answer, Call};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::lock;
use crate::network::{NetworkChange, NetworkError, NetworkWatcher, Tap};
use crate::vm::agent::{Agent, timeouts, within};
use crate::vm::vmm::{Vmm, VmmError};

/// Delay between a netlink notification and the update. The update applies all changes that happen within this delay.
/// For example, CNI adds an interface, addresses and routes one after another.
const COALESCE_DELAY: Duration = Duration::from_millis(50);
/// Maximum delay. While the network changes continuously, the delay doubles with every update. Each update reads the
/// pod's whole network. A pod must not use the node's CPU time by changing its network.
const MAX_DELAY: Duration = Duration::from_secs(2);
/// After this time without a change, the delay is [`COALESCE_DELAY`] again.
const QUIET: Duration = Duration::from_secs(5);
/// First backoff after a failed update. The backoff doubles with every retry.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Maximum backoff.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Why a change could not be applied to the guest.
#[derive(Debug, thiserror::Error)]
enum NetworkSyncError {
    /// The pod's network on the host cannot be read.
    #[error(transparent)]
    Read(#[from] NetworkError),
    /// The thread that reads the pod's network could not be started, or panicked.
    #[error("failed to run the thread that reads the pod's network")]
    Thread(#[source] io::Error),
    /// The VMM cannot attach an interface.
    #[error("failed to attach a network interface to the VM")]
    Attach(#[source] VmmError),
    /// The VMM cannot look up an interface by its MAC address.
    #[error("failed to look up a network interface of the VM by its MAC address")]
    Find(#[source] VmmError),
    /// The VMM cannot detach an interface.
    #[error("failed to detach a network interface from the VM")]
    Detach(#[source] VmmError),
    /// The agent could not apply the configuration.
    #[error("failed to configure the guest's network")]
    Guest(#[source] ttrpc::Error),
}

/// Request to apply all pending changes. The answer arrives after the attempt. If the attempt failed, the answer is a
/// text that contains the error and its causes.
type SettleRequest = oneshot::Sender<Result<(), String>>;

/// Handle of the task that applies changes.
pub struct NetworkSync(mpsc::UnboundedSender<SettleRequest>);

impl NetworkSync {
    /// Starts the task. The task ends when the VM ends, or when the handle is dropped.
    pub fn start(watcher: NetworkWatcher, notices: OwnedFd, vmm: Vmm, agent: Agent) -> Self {
        let (request, mut requests) = mpsc::unbounded_channel();
        let end = vmm.clone();
        let watcher = Arc::new(Mutex::new(watcher));
        let mut guest =
            Guest { watcher: Arc::clone(&watcher), vmm, agent, unbound_slots: Vec::new(), removed: Vec::new() };
        let updates = async move {
            let Err(error) = watch(notices, &mut requests, &mut guest).await else { return };
            tracing::warn!(%error, "stopped watching the pod's network; the guest does not get further changes");
            while let Some(request) = requests.recv().await {
                let _ = request.send(Err(format!("the pod's network is no longer watched: {error}")));
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                () = updates => {}
                _ = end.wait() => {}
            }
            remove_all(watcher);
        });
        Self(request)
    }

    /// Waits until the guest has the current configuration.
    ///
    /// # Errors
    /// The text of the error that prevented the update.
    pub async fn settle(&self) -> Result<(), String> {
        let (request, answer) = oneshot::channel();
        // While this handle exists, the task ends only if the VM ends. If the task has ended, return no error, because
        // the caller detects the end of the VM separately.
        if self.0.send(request).is_ok() { answer.await.unwrap_or(Ok(())) } else { Ok(()) }
    }
}

/// Applies changes to the guest. Tests implement this trait without a VM.
trait Apply {
    /// Reads the pod's network on the host and applies the changes.
    fn apply(&mut self) -> impl Future<Output = Result<(), NetworkSyncError>> + Send;
}

/// State of the retries after a failed update.
struct Retry {
    error: String,
    retry_at: Instant,
    backoff: Duration,
}

impl Retry {
    fn next(before: Option<Self>, error: NetworkSyncError) -> Self {
        let error = crate::chain(&error);
        if before.as_ref().is_none_or(|before| before.error != error) {
            tracing::warn!(error, "failed to apply a change of the pod's network to the guest; retrying");
        }
        let backoff = before.map_or(FIRST_BACKOFF, |before| (before.backoff * 2).min(MAX_BACKOFF));
        Self { error, retry_at: Instant::now() + backoff, backoff }
    }
}

/// The delays between notifications and updates.
struct Pace {
    delay: Duration,
    /// When the last update ended.
    last: Instant,
}

impl Pace {
    fn new() -> Self {
        Self { delay: COALESCE_DELAY, last: Instant::now() }
    }

    /// Returns the delay after a notification.
    fn next(&mut self) -> Duration {
        let quiet = self.last.elapsed() >= QUIET;
        let delay = if quiet { COALESCE_DELAY } else { self.delay };
        self.delay = (delay * 2).min(MAX_DELAY);
        delay
    }

    /// Records that an update has ended. The quiet time begins now, because the network can have changed during the
    /// update.
    fn update_ended(&mut self) {
        self.last = Instant::now();
    }
}

/// Applies changes until the [`NetworkSync`] handle is dropped.
async fn watch(
    notices: OwnedFd,
    requests: &mut mpsc::UnboundedReceiver<SettleRequest>,
    guest: &mut impl Apply,
) -> io::Result<()> {
    let notices = register(notices, Interest::READABLE)?;
    let mut retry: Option<Retry> = None;
    let mut pace = Pace::new();
    loop {
        let retry_at = retry.as_ref().map(|retry| retry.retry_at);
        let request = tokio::select! {
            // Ignore notifications during the backoff. An attempt that creates taps causes notifications, which must
            // not shorten the backoff.
            ready = notices.readable(), if retry_at.is_none() => {
                ready?.clear_ready();
                tokio::select! {
                    () = tokio::time::sleep(pace.next()) => None,
                    // A request ends the delay, because callers send a request only after the pod's network is
                    // completely configured.
                    request = requests.recv() => request,
                }
            }
            () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => None,
            request = requests.recv() => match request {
                Some(request) => Some(request),
                None => return Ok(()),
            },
        };
        if drain(&notices)? || retry.is_some() {
            retry = match guest.apply().await {
                Ok(()) => None,
                Err(error) => Some(Retry::next(retry.take(), error)),
            };
            pace.update_ended();
        }
        if let Some(request) = request {
            // Ignore an error, because the caller may have stopped waiting.
            let _ = request.send(retry.as_ref().map_or(Ok(()), |retry| Err(retry.error.clone())));
        }
    }
}

/// The pod's guest, and the work that a failed update leaves for the retry.
struct Guest {
    watcher: Arc<Mutex<NetworkWatcher>>,
    vmm: Vmm,
    agent: Agent,
    /// Slots of hot-plugged devices that the guest must bind to the driver.
    unbound_slots: Vec<u32>,
    /// MAC addresses of removed interfaces, whose devices must be hot-unplugged.
    removed: Vec<[u8; 6]>,
}

impl Apply for Guest {
    async fn apply(&mut self) -> Result<(), NetworkSyncError> {
        let Some(mut change) = read_change(&self.watcher).await? else { return Ok(()) };
        self.removed.append(&mut change.removed);
        let applied = self.apply_change(&mut change).await;
        match &applied {
            Ok(()) => tracing::info!("applied a change of the pod's network to the guest"),
            Err(_) => lock(&self.watcher).mark_undelivered(&change.taps),
        }
        applied
    }
}

impl Guest {
    /// Applies a change. Removes each attached tap from `change.taps`. After an error, `change.taps` contains the taps
    /// that were not attached.
    async fn apply_change(&mut self, change: &mut NetworkChange) -> Result<(), NetworkSyncError> {
        self.bind_devices().await?;
        if !change.taps.is_empty() || !self.removed.is_empty() {
            let rest = change.without_new();
            self.agent.update_network(&rest, timeouts::SLOW).await.map_err(NetworkSyncError::Guest)?;
        }
        // Detach removed interfaces first, because a new interface may have a removed interface's MAC address.
        self.detach_removed().await?;
        while let Some(tap) = change.taps.first() {
            let mut fds = Vec::new();
            let config = net_config(tap, &mut fds);
            self.vmm.allow_vhost(&config);
            let attached = self.vmm.call(Call::AttachNet(config), &fds).await.map_err(NetworkSyncError::Attach)?;
            let Answer::Attached { slot } = attached else {
                return Err(NetworkSyncError::Attach(VmmError::Unexpected));
            };
            change.taps.remove(0);
            self.unbound_slots.push(slot);
            self.bind_devices().await?;
        }
        self.agent.update_network(&change.current, timeouts::SLOW).await.map_err(NetworkSyncError::Guest)
    }

    /// Hot-unplugs the devices of the interfaces in `removed`.
    async fn detach_removed(&mut self) -> Result<(), NetworkSyncError> {
        while let Some(&mac) = self.removed.last() {
            let found = self.vmm.call(Call::FindNet(mac), &[]).await.map_err(NetworkSyncError::Find)?;
            if let Answer::Attached { slot } = found {
                let request = UnbindDeviceRequest { slot, ..Default::default() };
                self.agent
                    .sandbox
                    .unbind_device(within(timeouts::SLOW), &request)
                    .await
                    .map_err(NetworkSyncError::Guest)?;
                self.vmm.call(Call::Detach { slot }, &[]).await.map_err(NetworkSyncError::Detach)?;
            }
            self.vmm.revoke_vhost(mac);
            self.removed.pop();
        }
        Ok(())
    }

    /// Tells the agent to bind the devices in `unbound_slots` to the driver.
    async fn bind_devices(&mut self) -> Result<(), NetworkSyncError> {
        while let Some(&slot) = self.unbound_slots.last() {
            let request = BindDeviceRequest { slot, ..Default::default() };
            self.agent.sandbox.bind_device(within(timeouts::QUICK), &request).await.map_err(NetworkSyncError::Guest)?;
            self.unbound_slots.pop();
        }
        Ok(())
    }
}

/// Reads all pending netlink notifications. Returns whether at least one notification was pending.
fn drain(notices: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    let mut some = false;
    loop {
        let mut bytes = [0u8; 8192];
        match recv(notices.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(_) => some = true,
            // The socket's buffer overflowed, and the kernel dropped notifications.
            Err(Errno::ENOBUFS) => some = true,
            Err(Errno::EAGAIN) => return Ok(some),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads the pod's network in a new thread, because [`NetworkWatcher::read_change`] permanently moves the calling
/// thread to the pod's network namespace.
async fn read_change(watcher: &Arc<Mutex<NetworkWatcher>>) -> Result<Option<NetworkChange>, NetworkSyncError> {
    let (done, changes) = oneshot::channel();
    let watcher = Arc::clone(watcher);
    let thread = std::thread::Builder::new().name("pod-network".into()).spawn(move || {
        // Ignore an error, because nothing waits for the result if the sandbox has ended.
        let _ = done.send(lock(&watcher).read_change());
    });
    thread.map_err(NetworkSyncError::Thread)?;
    Ok(changes.await.map_err(|error| NetworkSyncError::Thread(io::Error::other(error)))??)
}

/// Removes the taps and tc filters in a new thread, because [`NetworkWatcher::remove_all`] permanently moves the
/// calling thread to the pod's network namespace.
fn remove_all(watcher: Arc<Mutex<NetworkWatcher>>) {
    let thread = std::thread::Builder::new().name("pod-network".into()).spawn(move || lock(&watcher).remove_all());
    if let Err(error) = thread {
        tracing::warn!(%error, "failed to start the thread that removes the pod's tc filters");
    }
}

/// Returns the VMM's configuration of the network device for `tap`. Adds the tap's fds to `fds`.
pub fn net_config<'a>(tap: &'a Tap, fds: &mut Vec<BorrowedFd<'a>>) -> NetConfig {
    let add = |fd: &'a OwnedFd| {
        fds.push(fd.as_fd());
        FdIndex(fds.len() - 1)
    };
    let taps = tap.fds.iter().map(add).collect();
    NetConfig {
        taps,
        vhost: tap.vhost,
        mac: tap.mac,
        mtu: tap.mtu,
        receive_rate_limit: tap.rate_limits.receive,
        transmit_rate_limit: tap.rate_limits.transmit,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A guest whose next `left` updates fail. Sends the time of each update to `tries`.
    struct FailingGuest {
        tries: mpsc::UnboundedSender<Instant>,
        left: u32,
        /// How long an update takes.
        duration: Duration,
        notices: UnixStream,
    }

    impl Apply for FailingGuest {
        async fn apply(&mut self) -> Result<(), NetworkSyncError> {
            self.tries.send(Instant::now()).unwrap();
            // Every attempt causes a notification, as the creation of a tap does.
            self.notices.write_all(b"x").unwrap();
            tokio::time::sleep(self.duration).await;
            match self.left {
                0 => Ok(()),
                _ => {
                    self.left -= 1;
                    Err(NetworkSyncError::Attach(VmmError::Unexpected))
                }
            }
        }
    }

    /// Starts the task with a guest whose first `left` updates fail. Returns the task's handle, the socket that sends
    /// notifications, and the receiver for the time of each update.
    fn watched(left: u32) -> (NetworkSync, UnixStream, mpsc::UnboundedReceiver<Instant>) {
        watched_for(left, Duration::ZERO)
    }

    /// Does the same as [`watched`], with updates that take `duration`.
    fn watched_for(left: u32, duration: Duration) -> (NetworkSync, UnixStream, mpsc::UnboundedReceiver<Instant>) {
        let (notices, input) = UnixStream::pair().unwrap();
        notices.set_nonblocking(true).unwrap();
        let (request, mut requests) = mpsc::unbounded_channel();
        let (tries, tried) = mpsc::unbounded_channel();
        let mut guest = FailingGuest { tries, left, duration, notices: input.try_clone().unwrap() };
        tokio::spawn(async move { watch(notices.into(), &mut requests, &mut guest).await.unwrap() });
        (NetworkSync(request), input, tried)
    }

    #[tokio::test(start_paused = true)]
    async fn failed_updates_are_retried_with_backoff() {
        let (_network_sync, mut input, mut tried) = watched(7);
        input.write_all(b"x").unwrap();
        let mut last = tried.recv().await.unwrap();
        for secs in [1, 2, 4, 8, 16, 30, 30] {
            let at = tried.recv().await.unwrap();
            // Compare whole seconds, because the runtime's clock has a resolution of only one millisecond.
            assert_eq!((at - last).as_secs(), secs);
            last = at;
        }
        // The eighth attempt succeeded. The notification from this attempt causes a ninth attempt, without a backoff.
        assert!((tried.recv().await.unwrap() - last) < FIRST_BACKOFF);
    }

    #[tokio::test(start_paused = true)]
    async fn network_that_changes_all_the_time_is_read_less_often() {
        for duration in [Duration::ZERO, QUIET * 2] {
            let (_network_sync, mut input, mut tried) = watched_for(0, duration);
            // Each attempt of this guest causes the next notification.
            input.write_all(b"x").unwrap();
            let mut last = tried.recv().await.unwrap();
            let mut pauses = Vec::new();
            for _ in 0..10 {
                let at = tried.recv().await.unwrap();
                pauses.push(at - (last + duration));
                last = at;
            }
            assert!(pauses[0] < Duration::from_millis(150), "{pauses:?}");
            assert!(pauses[6..].iter().all(|&pause| pause >= MAX_DELAY), "{pauses:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn settle_retries_without_backoff_and_returns_the_error() {
        let (network_sync, mut input, mut tried) = watched(2);
        assert_eq!(network_sync.settle().await, Ok(()));
        assert!(tried.try_recv().is_err(), "an attempt was made, although nothing has changed");
        input.write_all(b"x").unwrap();
        let began = Instant::now();
        assert!(network_sync.settle().await.unwrap_err().contains("attach a network interface"));
        assert!(network_sync.settle().await.is_err());
        assert_eq!(network_sync.settle().await, Ok(()));
        assert!(began.elapsed() < FIRST_BACKOFF);
    }
}
