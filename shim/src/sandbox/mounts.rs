//! Propagates later mounts and unmounts of the host to volumes with `rslave` propagation.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::bundle;

/// How long the start of a process waits for mounts that the host made before.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);

/// The follower of a sandbox's volumes. It does nothing until a container has such a volume.
#[derive(Default)]
pub struct Follower {
    task: OnceLock<JoinHandle<()>>,
}

impl Follower {
    /// Follows from now on; once is enough. Call it within the runtime.
    ///
    /// # Errors
    /// When the list of mounts cannot be opened or polled.
    pub fn start(&self, share: &Path) -> io::Result<()> {
        if self.task.get().is_some() {
            return Ok(());
        }
        // Poll(2) of this file tells of every change of the mount namespace (proc_pid_mounts(5)).
        let list = File::open("/proc/self/mountinfo")?;
        // SAFETY: a File stays the same open descriptor until it is dropped, which deregisters it first.
        let list = unsafe { AsyncFd::register_with_interest(list, Interest::PRIORITY)? };
        let task = tokio::spawn(follow(list, share.to_owned()));
        if let Err(second) = self.task.set(task) {
            second.abort();
        }
        Ok(())
    }

    /// Waits until what the host has mounted by now is seen by the guest, or it has been waited for long enough.
    pub async fn settle(&self, share: &Path) {
        if self.task.get().is_some() && timeout(SETTLE_LIMIT, sync(share.to_owned())).await.is_err() {
            tracing::warn!(limit = ?SETTLE_LIMIT, "mounts of the host are not in the volumes yet");
        }
    }

    /// Follows no longer.
    pub fn stop(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

async fn follow(list: AsyncFd<File>, share: PathBuf) {
    let mut last = None;
    loop {
        let failure = sync(share.clone()).await.err().map(|error| error.to_string());
        // A mount that fails is retried at every change, and logged once.
        if let Some(error) = failure.as_ref().filter(|_| failure != last) {
            tracing::warn!(error, "failed to follow the host's mounts in a volume");
        }
        last = failure;
        match list.ready(Interest::PRIORITY).await {
            Ok(mut changed) => changed.clear_ready(),
            Err(error) => return tracing::error!(%error, "failed to watch the host's mounts"),
        }
    }
}

async fn sync(share: PathBuf) -> io::Result<()> {
    tokio::task::spawn_blocking(move || bundle::sync_mounts(&share)).await.map_err(io::Error::other)?
}
