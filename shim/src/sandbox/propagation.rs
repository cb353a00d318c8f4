//! Propagates the host's later mounts and unmounts to volumes with `rslave` propagation.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::async_fd::register;
use crate::volumes;

/// Maximum time for which the start of a process waits until the volumes show the host's earlier mounts.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between a change of the mount list and the update that it causes. The delay saves updates, because changes come
/// in bursts, and each update reads the whole list.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Minimum time between two log lines about failed updates. A guest can make updates fail by renaming directories.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Keeps the mounts in a sandbox's volumes up to date. It does nothing until a container has an `rslave` volume.
#[derive(Default)]
pub struct Propagation {
    running: OnceLock<Running>,
}

struct Running {
    task: JoinHandle<()>,
    /// Number of the latest requested update.
    requested: watch::Sender<u64>,
    /// Number of the latest request that an update has served.
    served: watch::Receiver<u64>,
}

impl Propagation {
    /// Starts the updates, unless they are running. Must be called in an async runtime.
    ///
    /// # Errors
    /// If the mount list cannot be opened or polled.
    pub fn start(&self, share: &Path) -> io::Result<()> {
        if self.running.get().is_some() {
            return Ok(());
        }
        // poll(2) of this file reports every change of the mount namespace (proc_pid_mounts(5)).
        let list = File::open("/proc/self/mountinfo")?;
        let list = register(list, Interest::PRIORITY)?;
        let (requested, requests) = watch::channel(0);
        let (served_sender, served) = watch::channel(0);
        let task = tokio::spawn(run(list, share.to_owned(), requests, served_sender));
        if let Err(second) = self.running.set(Running { task, requested, served }) {
            second.task.abort();
        }
        Ok(())
    }

    /// Waits at most `SETTLE_TIMEOUT` until the guest sees the mounts that the host made before the call.
    pub async fn settle(&self) {
        let Some(running) = self.running.get() else { return };
        let mut number = 0;
        running.requested.send_modify(|latest| {
            *latest += 1;
            number = *latest;
        });
        let mut served = running.served.clone();
        match timeout(SETTLE_TIMEOUT, served.wait_for(|served| *served >= number)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => tracing::warn!("the propagation of the host's later mounts to the volumes has stopped"),
            Err(_) => {
                tracing::warn!(limit = ?SETTLE_TIMEOUT, "the host's recent mounts are not in the volumes yet");
            }
        }
    }

    /// Stops the updates. An update that is in progress continues, and ignores volumes that are removed.
    pub fn stop(&self) {
        if let Some(running) = self.running.get() {
            running.task.abort();
        }
    }
}

/// Runs one update at a time. An update that hangs in a file system blocks one thread, and holds no lock.
async fn run(list: AsyncFd<File>, share: PathBuf, mut requests: watch::Receiver<u64>, served: watch::Sender<u64>) {
    let mut failures = Failures::default();
    loop {
        let request = *requests.borrow_and_update();
        let share = share.clone();
        let updated = tokio::task::spawn_blocking(move || volumes::sync_mounts(&share)).await;
        match updated {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failures.log(&crate::chain(&error)),
            Err(error) => failures.log(&error),
        }
        served.send_replace(request);
        tokio::select! {
            changed = list.ready(Interest::PRIORITY) => match changed {
                Ok(mut changed) => changed.clear_ready(),
                Err(error) => return tracing::error!(%error, "failed to watch the host's mounts"),
            },
            open = requests.changed() => match open {
                Ok(()) => continue,
                Err(_) => return,
            },
        }
        // A request ends the delay early.
        let _ = timeout(DEBOUNCE, requests.changed()).await;
    }
}

/// Logs failed updates, at a limited rate.
#[derive(Default)]
struct Failures {
    logged: Option<Instant>,
    suppressed: u32,
}

impl Failures {
    fn log(&mut self, error: &dyn std::fmt::Display) {
        if self.logged.is_some_and(|logged| logged.elapsed() < LOG_INTERVAL) {
            self.suppressed = self.suppressed.saturating_add(1);
            return;
        }
        tracing::warn!(%error, suppressed = self.suppressed, "failed to propagate the host's mounts to a volume");
        *self = Self { logged: Some(Instant::now()), suppressed: 0 };
    }
}
