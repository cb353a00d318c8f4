//! Watches cgroup files for changes, and a container's memory events for OOM kills.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::cgroup::Cgroup;
use crate::events::EventHub;

/// Watches one file for changes with inotify(7). The kernel generates notifications for cgroup v2's `*.events` files.
pub struct FileWatch {
    inotify: AsyncFd<File>,
}

impl FileWatch {
    /// Starts watching `path`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
        let inotify = OwnedFd::from(inotify);
        Ok(Self { inotify: husk_base::async_fd::register(File::from(inotify), Interest::READABLE)? })
    }

    /// Waits for a change. Returns false if the kernel has removed the watch (IN_IGNORED), or if the
    /// inotify fd cannot be read.
    pub async fn changed(&self) -> bool {
        let mut bytes = [0u8; 1024];
        let Ok(read) = self.inotify.async_io(Interest::READABLE, |mut file| file.read(&mut bytes)).await else {
            return false;
        };
        // struct inotify_event: wd, mask, cookie, len. No name follows, because the watch is on a file.
        let events = bytes.get(..read).unwrap_or_default().chunks_exact(16);
        !events
            .filter_map(|event| event.get(4..8)?.try_into().ok().map(u32::from_ne_bytes))
            .any(|mask| mask & libc::IN_IGNORED != 0)
    }

    /// Waits until `condition` is true. Checks the condition now and after every change of the file.
    ///
    /// # Errors
    /// Fails with [`io::ErrorKind::TimedOut`] if the condition is still false at `deadline`. Fails with another error
    /// if the watch fails.
    pub async fn wait_until(&self, deadline: Instant, condition: impl Fn() -> bool) -> io::Result<()> {
        while !condition() {
            match timeout_at(deadline, self.changed()).await {
                Ok(true) => {}
                // The condition may have become true before the kernel removed the watch.
                Ok(false) if condition() => return Ok(()),
                Ok(false) => return Err(io::Error::other("the watch on the file has ended")),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }
}

/// Watches for the OOM kills of one container.
pub struct OomWatch {
    id: String,
    cgroup: Cgroup,
    hub: EventHub,
    /// Total number of OOM kills at the time of the last published event.
    reported: AtomicU64,
}

impl OomWatch {
    /// Creates a watch that has not published any OOM kill.
    pub fn new(id: &str, cgroup: Cgroup, hub: EventHub) -> Self {
        Self { id: id.to_owned(), cgroup, hub, reported: AtomicU64::new(0) }
    }

    /// Publishes an event if there are new OOM kills. Returns whether the container has ever had an OOM kill.
    pub fn check(&self) -> bool {
        let kills = self.cgroup.oom_kills();
        if kills > self.reported.fetch_max(kills, Ordering::Relaxed) {
            self.hub.oom(&self.id);
        }
        self.reported.load(Ordering::Relaxed) > 0
    }

    /// Checks for OOM kills at every change of `memory.events`, until the watch fails or the async task
    /// that runs this function is aborted.
    pub async fn run(self: std::sync::Arc<Self>) {
        match FileWatch::new(&self.cgroup.path().join("memory.events")) {
            Ok(watch) => {
                while watch.changed().await {
                    self.check();
                }
            }
            Err(error) => tracing::warn!("failed to watch the memory events of container {}: {error}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn wait_until_ends_if_the_condition_is_true_or_the_watch_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cgroup.events");
        std::fs::write(&path, "populated 1\n").unwrap();
        let watch = FileWatch::new(&path).unwrap();
        let is_empty = || std::fs::read_to_string(&path).unwrap() == "populated 0\n";
        let error = watch.wait_until(Instant::now(), is_empty).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let deadline = Instant::now() + Duration::from_secs(10);
        std::fs::write(&path, "populated 0\n").unwrap();
        watch.wait_until(deadline, is_empty).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = watch.wait_until(deadline, || false).await.unwrap_err();
        assert_ne!(error.kind(), io::ErrorKind::TimedOut);
    }
}
