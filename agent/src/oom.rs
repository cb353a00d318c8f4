//! Watches control group files for changes, and one container's memory events for kills.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;
use crate::events::Hub;

/// Reports every change of one file; the kernel notifies cgroup v2's `*.events` files.
pub struct FileWatch {
    inotify: AsyncFd<File>,
}

impl FileWatch {
    /// Starts watching.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a non-negative result is a descriptor nobody else owns; the path lives through the call.
        let inotify = unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let inotify = OwnedFd::from_raw_fd(fd);
            if libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_MODIFY) < 0 {
                return Err(io::Error::last_os_error());
            }
            inotify
        };
        Ok(Self { inotify: crate::io::register(File::from(inotify), Interest::READABLE)? })
    }

    /// Waits for a change; false when the file is gone.
    pub async fn changed(&self) -> bool {
        let mut bytes = [0u8; 1024];
        let Ok(read) = self.inotify.async_io(Interest::READABLE, |mut file| file.read(&mut bytes)).await else {
            return false;
        };
        // struct inotify_event: wd, mask, cookie, len; the watch is on a file, so no name follows.
        let events = bytes.get(..read).unwrap_or_default().chunks_exact(16);
        !events
            .filter_map(|event| event.get(4..8)?.try_into().ok().map(u32::from_ne_bytes))
            .any(|mask| mask & libc::IN_IGNORED != 0)
    }
}

/// One container's kills for want of memory.
pub struct OomWatch {
    id: String,
    cgroup: Cgroup,
    hub: Hub,
    seen: AtomicU64,
}

impl OomWatch {
    /// Nothing has been seen yet.
    pub fn new(id: &str, cgroup: Cgroup, hub: Hub) -> Self {
        Self { id: id.to_owned(), cgroup, hub, seen: AtomicU64::new(0) }
    }

    /// Looks, publishes what is new, and says whether there has ever been a kill.
    pub fn check(&self) -> bool {
        let kills = self.cgroup.oom_kills();
        if kills > self.seen.fetch_max(kills, Ordering::Relaxed) {
            self.hub.oom(&self.id);
        }
        self.seen.load(Ordering::Relaxed) > 0
    }

    /// Looks at every change for as long as the group exists.
    pub async fn run(self: std::sync::Arc<Self>) {
        match FileWatch::new(&self.cgroup.path().join("memory.events")) {
            Ok(watch) => {
                while watch.changed().await {
                    self.check();
                }
            }
            Err(error) => tracing::warn!("no memory events for {}: {error}", self.id),
        }
    }
}
