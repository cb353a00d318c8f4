//! Keeps volumes with `rslave` propagation up to date. When the host mounts or unmounts something in a volume's source,
//! this module makes the same change in the volume.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use husk_base::async_fd::register;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::blocking;
use crate::sandbox::volume_updates::Updates;
use crate::volumes::propagate;

/// Timeout of [`Propagation::settle`]. The start of a process waits for `settle`.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay between a change of the mount list and the update of the volumes. Changes come in bursts, and each update
/// reads the whole list. With the delay, one update handles a whole burst.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Minimum time between two log lines about failed updates. Without this limit, a guest could flood the log. For
/// example, updates can fail if the guest renames directories in a volume.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Updates the mounts in a sandbox's volumes. Does nothing before [`Propagation::start`].
#[derive(Default)]
pub struct Propagation {
    running: OnceLock<Running>,
}

struct Running {
    task: JoinHandle<()>,
    /// Number of the latest request for an update.
    requested: watch::Sender<u64>,
    /// Number of the latest request that the updates have served.
    served: watch::Receiver<u64>,
}

impl Propagation {
    /// Starts the updates. A second call does nothing. Must be called in an async runtime.
    ///
    /// # Errors
    /// Fails if the mount list cannot be opened or polled.
    pub fn start(&self, share: &Path) -> io::Result<()> {
        if self.running.get().is_some() {
            return Ok(());
        }
        // poll(2) on this file reports every change of the mount namespace (proc_pid_mounts(5)).
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

    /// Waits until the guest sees the mounts that the host made before the call. Waits at most `SETTLE_TIMEOUT`.
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
            Ok(Err(_)) => tracing::warn!("the host's new mounts are no longer propagated to the pod's volumes"),
            Err(_) => {
                tracing::warn!(limit = ?SETTLE_TIMEOUT, "the host's recent mounts are not in the pod's volumes yet");
            }
        }
    }

    /// Prevents further updates. Updates in progress continue, and ignore volumes that have been removed.
    pub fn stop(&self) {
        if let Some(running) = self.running.get() {
            running.task.abort();
        }
    }
}

/// Updates the volumes after each change of the mount list, and at each request. An update that hangs in a file system
/// blocks only one thread.
async fn run(list: AsyncFd<File>, share: PathBuf, mut requests: watch::Receiver<u64>, served: watch::Sender<u64>) {
    let mut failures = Failures::default();
    let mut updates = Updates::new({
        let share = share.clone();
        move |volume| propagate::update(&share, volume).map_err(|error| crate::chain(&error))
    });
    // Time at which the update for a pending change starts. `None` if no change is pending.
    let mut due = Some(Instant::now());
    loop {
        let start = tokio::select! {
            changed = list.ready(Interest::PRIORITY), if due.is_none() => match changed {
                Ok(mut changed) => {
                    changed.clear_ready();
                    due = Some(Instant::now() + DEBOUNCE);
                    false
                }
                Err(error) => return tracing::error!(%error, "failed to watch the host's mounts"),
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => true,
            // A request does not wait for the delay.
            open = requests.changed() => match open {
                Ok(()) => true,
                Err(_) => return,
            },
            Some(updated) = updates.ended() => {
                updated.unwrap_or_else(|error| failures.log(&error));
                false
            }
        };
        if start {
            due = None;
            let request = *requests.borrow_and_update();
            match volumes_of(share.clone()).await {
                Ok(volumes) => updates.start(volumes, request),
                Err(error) => failures.log(&error),
            }
        }
        let latest = updates.served();
        served.send_if_modified(|served| std::mem::replace(served, latest) != latest);
    }
}

/// Returns the names of the volumes with `rslave` propagation.
async fn volumes_of(share: PathBuf) -> Result<Vec<OsString>, String> {
    match blocking::spawn(move || propagate::volumes(&share)).await {
        Ok(volumes) => volumes.map_err(|error| crate::chain(&error)),
        Err(error) => Err(error.to_string()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::Share;
    use crate::volumes::hanging_fs::HangingFileSystem;
    use crate::volumes::test_support::{bind_for, isolated, shared_mount, tmpfs};

    /// How long a mount may take to arrive on a busy machine.
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn hanging_volume_does_not_delay_other_volumes() {
        isolated(|dir| {
            let share = Share::mount(dir).unwrap();
            let [(stuck, stuck_in_share), (other, other_in_share)] = ["stuck", "other"].map(|name| {
                let root = shared_mount(&dir.join(name));
                for name in ["hanging", "later"] {
                    std::fs::create_dir(root.join(name)).unwrap();
                }
                let in_share = bind_for(&share, name, &root, &["rbind", "rslave"]);
                (root, in_share)
            });
            let mount_later = |root: &Path| {
                tmpfs(&root.join("later"));
                std::fs::write(root.join("later/file"), "").unwrap();
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let propagation = Propagation::default();
                propagation.start(&share.host).unwrap();
                let mut hanging = HangingFileSystem::mount(&stuck.join("hanging"));
                let waiting = tokio::task::spawn_blocking(move || {
                    hanging.wait_for_request();
                    hanging
                });
                while !waiting.is_finished() {
                    propagation.settle().await;
                }
                let hanging = waiting.await.unwrap();
                mount_later(&stuck);
                mount_later(&other);
                // `settle` does not wait for an update that hangs, and waits for others for a limited time. Therefore,
                // call `settle` until the mount arrives.
                let arrives = async |volume: &Path| {
                    let arrived = async {
                        while !volume.join("later/file").exists() {
                            propagation.settle().await;
                        }
                    };
                    timeout(LIMIT, arrived).await.unwrap();
                };
                arrives(&other_in_share).await;
                drop(hanging);
                arrives(&stuck_in_share).await;
                propagation.stop();
            });
        });
    }
}
