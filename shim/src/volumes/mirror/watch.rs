//! Watches a volume for changes, with inotify(7) on each of the volume's directories.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use husk_base::async_fd::register;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::volumes::mirror::Volume;

/// Events that count as a change. Reads do not count, because each copy reads the volume and would cause another copy.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_ONLYDIR);

/// A watched volume.
pub struct Watch {
    inotify: Arc<Inotify>,
    /// A second fd of the inotify instance, registered with the async runtime.
    events: AsyncFd<File>,
}

impl Watch {
    /// Starts to watch `volume`.
    ///
    /// # Errors
    /// If the volume cannot be read, or an inotify limit of the host is reached.
    pub async fn new(volume: &Volume) -> io::Result<Self> {
        let inotify = Arc::new(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?);
        let events = File::from(inotify.as_fd().try_clone_to_owned()?);
        let events = register(events, Interest::READABLE)?;
        let watch = Self { inotify, events };
        watch.add_new_directories(volume).await?;
        Ok(watch)
    }

    /// Adds watches for directories of `volume` that have no watch.
    ///
    /// # Errors
    /// The errors of [`Watch::new`].
    pub async fn add_new_directories(&self, volume: &Volume) -> io::Result<()> {
        let (inotify, volume) = (Arc::clone(&self.inotify), volume.clone());
        tokio::task::spawn_blocking(move || watch_tree(&inotify, &volume, Path::new("")))
            .await
            .map_err(io::Error::other)?
    }

    /// Waits for a change, and reads all queued events.
    ///
    /// # Errors
    /// If the events cannot be read.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut events = [0; 4096];
        self.events.async_io(Interest::READABLE, |mut file: &File| file.read(&mut events)).await?;
        loop {
            match self.events.get_ref().read(&mut events) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Watches the directory `path` of the volume, and all directories below `path`. Blocks the calling thread.
fn watch_tree(inotify: &Inotify, volume: &Volume, path: &Path) -> io::Result<()> {
    let directory = volume.open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    // inotify_add_watch(2) takes a path instead of an fd. The path in `/proc` leads to the open directory.
    let opened = format!("/proc/self/fd/{}", directory.as_raw_fd());
    inotify.add_watch(opened.as_str(), CHANGES)?;
    for entry in fs::read_dir(&opened)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match watch_tree(inotify, volume, &path.join(entry.file_name())) {
                // The directory was removed after it was listed. An event reports the removal.
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::mount_api;

    #[tokio::test(flavor = "current_thread")]
    async fn changed_reports_changes_in_new_directories() {
        let dir = tempfile::tempdir().unwrap();
        let root = mount_api::open_path(dir.path(), true).unwrap();
        let volume = Volume::new(root, dir.path().to_owned()).unwrap();
        let mut watch = Watch::new(&volume).await.unwrap();
        fs::create_dir(dir.path().join("new")).unwrap();
        watch.changed().await.unwrap();
        watch.add_new_directories(&volume).await.unwrap();
        fs::write(dir.path().join("new/file"), "x").unwrap();
        watch.changed().await.unwrap();
    }
}
