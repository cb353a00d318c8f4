//! Watches a volume for changes.
//!
//! A [`Watch`] uses the shim's inotify instance. Without an inotify instance or a free inotify watch, it polls: it
//! compares the volume with the volume's earlier state.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::blocking;
use crate::volumes::mirror::Volume;
use crate::volumes::mirror::watcher::{Subscription, Watchers};

/// Interval between two comparisons. The kubelet changes a volume about once a minute.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum depth of directories for a comparison, as for a copy.
const MAX_DEPTH: usize = 64;

/// How a volume is watched.
enum Mode {
    /// With the shim's inotify instance.
    Inotify(Arc<Subscription>),
    /// By comparisons. The field is the fingerprint of the volume's last known state.
    Polling(u64),
}

/// A watched volume.
pub struct Watch {
    volume: Volume,
    mode: Mode,
}

impl Watch {
    /// Starts to watch `volume`. Falls back to comparisons if the volume cannot be watched with inotify.
    ///
    /// # Errors
    /// If the volume cannot be read.
    pub async fn new(watchers: &Watchers, volume: &Volume) -> io::Result<Self> {
        let volume = volume.clone();
        let watched = match watchers.subscribe().await {
            Ok(subscription) => add_directories(Arc::new(subscription), volume.clone()).await,
            Err(error) => Err(error),
        };
        match watched {
            Ok(subscription) => Ok(Self { volume, mode: Mode::Inotify(subscription) }),
            Err(error) if is_limit(&error) => {
                let path = volume.path.display();
                tracing::warn!(
                    volume = %path, %error,
                    "failed to watch a volume with inotify (see fs.inotify.max_user_instances and \
                     fs.inotify.max_user_watches); comparing it every {} s instead",
                    POLL_INTERVAL.as_secs()
                );
                let mode = Mode::Polling(read_fingerprint(volume.clone()).await?);
                Ok(Self { volume, mode })
            }
            Err(error) => Err(error),
        }
    }

    /// Adds watches for directories of the volume that have no watch.
    ///
    /// # Errors
    /// The errors of [`Watch::new`], and ENOSPC if the node has no free inotify watch. From then on, this
    /// [`Watch`] polls the volume.
    pub async fn add_new_directories(&mut self) -> io::Result<()> {
        let Mode::Inotify(subscription) = &self.mode else { return Ok(()) };
        match add_directories(Arc::clone(subscription), self.volume.clone()).await {
            Err(error) if is_limit(&error) => {
                self.mode = Mode::Polling(read_fingerprint(self.volume.clone()).await?);
                Err(error)
            }
            result => result.map(drop),
        }
    }

    /// Waits for a change.
    ///
    /// # Errors
    /// If the shim can no longer read inotify's events.
    pub async fn changed(&mut self) -> io::Result<()> {
        let last = match &mut self.mode {
            Mode::Inotify(subscription) => return subscription.changed().await,
            Mode::Polling(last) => last,
        };
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            // A volume that cannot be read has changed, for example because it was removed.
            let current = read_fingerprint(self.volume.clone()).await;
            if !current.as_ref().is_ok_and(|current| current == last) {
                *last = current.unwrap_or_default();
                return Ok(());
            }
        }
    }
}

/// Returns whether a limit of the node on inotify was reached (inotify_init(2), inotify_add_watch(2)).
fn is_limit(error: &io::Error) -> bool {
    let limits = [Errno::EMFILE, Errno::ENFILE, Errno::ENOSPC, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|error| limits.contains(&Errno::from_raw(error)))
}

async fn add_directories(subscription: Arc<Subscription>, volume: Volume) -> io::Result<Arc<Subscription>> {
    let watch = move || watch_tree(&subscription, &volume, Path::new("")).map(|()| subscription);
    blocking::spawn(watch).await?
}

/// Watches the directory `path` of the volume, and all directories below `path`. Blocks the calling thread.
fn watch_tree(subscription: &Subscription, volume: &Volume, path: &Path) -> io::Result<()> {
    let directory = volume.open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    // inotify_add_watch(2) takes a path instead of an fd. The path in `/proc` leads to the open directory.
    let opened = format!("/proc/self/fd/{}", directory.as_raw_fd());
    subscription.add(Path::new(&opened))?;
    for entry in fs::read_dir(&opened)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match watch_tree(subscription, volume, &path.join(entry.file_name())) {
                // The directory was removed after it was listed. An event reports the removal.
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

async fn read_fingerprint(volume: Volume) -> io::Result<u64> {
    let read = move || {
        let mut hasher = DefaultHasher::new();
        hash_tree(&mut hasher, &volume, Path::new(""), 0).map(|()| hasher.finish())
    };
    blocking::spawn(read).await?
}

/// Adds the names, times and sizes of all entries below the directory `path` to the hash. Blocks the calling thread.
fn hash_tree(hasher: &mut DefaultHasher, volume: &Volume, path: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let directory = volume.open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let opened = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let entries = fs::read_dir(&opened)?;
    let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let found = fs::symlink_metadata(opened.join(&name))?;
        let times = (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec());
        (&name, found.ino(), found.mode(), found.size(), times).hash(hasher);
        if found.is_dir() {
            hash_tree(hasher, volume, &path.join(&name), depth + 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_view::HostView;

    fn volume(path: &Path) -> Volume {
        let host = HostView::own();
        Volume::new(&host.open(path, true).unwrap(), path.to_owned(), &host).unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn changed_reports_changes_in_new_directories() {
        let dir = tempfile::tempdir().unwrap();
        let watchers = Watchers::default();
        let mut watch = Watch::new(&watchers, &volume(dir.path())).await.unwrap();
        fs::create_dir(dir.path().join("new")).unwrap();
        watch.changed().await.unwrap();
        watch.add_new_directories().await.unwrap();
        fs::write(dir.path().join("new/file"), "x").unwrap();
        watch.changed().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn changed_reports_changes_without_inotify() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("v1")).unwrap();
        fs::write(dir.path().join("v1/key"), "one").unwrap();
        std::os::unix::fs::symlink("v1", dir.path().join("..data")).unwrap();
        let volume = volume(dir.path());
        let mode = Mode::Polling(read_fingerprint(volume.clone()).await.unwrap());
        let mut watch = Watch { volume, mode };
        assert!(tokio::time::timeout(POLL_INTERVAL * 3, watch.changed()).await.is_err());
        let changes: [&dyn Fn(); 4] = [
            &|| fs::write(dir.path().join("v1/key"), "two").unwrap(),
            &|| fs::write(dir.path().join("v1/other"), "").unwrap(),
            &|| fs::rename(dir.path().join("..data"), dir.path().join("..old")).unwrap(),
            &|| fs::remove_dir_all(dir.path()).unwrap(),
        ];
        for change in changes {
            change();
            tokio::time::timeout(POLL_INTERVAL * 2, watch.changed()).await.unwrap().unwrap();
        }
    }
}
