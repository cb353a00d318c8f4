//! The shim's inotify instance, which all mirrored volumes share.
//!
//! A user may have only 128 instances by default (fs.inotify.max_user_instances), and all shims of a node belong to
//! root. Therefore a shim has at most one instance, and only some shims of a node have one ([`Permit`]).

use std::collections::{HashMap, HashSet};
use std::convert::identity;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use husk_base::async_fd::register;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::blocking;
use crate::lock;
use crate::volumes::mirror::instance_limit::Permit;

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

/// The inotify instance, which exists while a volume is watched.
#[derive(Default)]
pub struct Watchers(Mutex<Weak<Watcher>>);

struct Watcher {
    inotify: Inotify,
    _permit: Permit,
    routes: Mutex<Routes>,
    /// The task that reads the events.
    reader: AbortHandle,
}

/// Maps each inotify watch to the subscriptions that get its events. Volumes can have directories in common, and
/// inotify has only one watch for each directory.
#[derive(Default)]
struct Routes {
    last_id: u64,
    watches: HashMap<WatchDescriptor, HashSet<u64>>,
    subscriptions: HashMap<u64, Arc<Changes>>,
}

#[derive(Default)]
struct Changes {
    changed: Notify,
    /// Why no further event arrives.
    failed: Mutex<Option<Errno>>,
}

/// A set of watched directories. The watches are removed when the subscription is dropped.
pub struct Subscription {
    watcher: Arc<Watcher>,
    id: u64,
    changes: Arc<Changes>,
}

impl Watchers {
    /// Returns a subscription without directories. Creates the inotify instance if there is none.
    ///
    /// # Errors
    /// If a limit of the node is reached, for example EMFILE for fs.inotify.max_user_instances, or if the other shims
    /// of the node have all instances that shims may have.
    pub async fn subscribe(&self) -> io::Result<Subscription> {
        let current = lock(&self.0).upgrade();
        let watcher = match current {
            Some(watcher) => watcher,
            None => {
                let permit = blocking::spawn(Permit::take).await.and_then(identity);
                self.current_or_start(permit)?
            }
        };
        let changes = Arc::<Changes>::default();
        let mut routes = lock(&watcher.routes);
        routes.last_id += 1;
        let id = routes.last_id;
        routes.subscriptions.insert(id, Arc::clone(&changes));
        drop(routes);
        Ok(Subscription { watcher, id, changes })
    }

    /// Returns the inotify instance. Starts it with `permit` if no other task has started it meanwhile.
    fn current_or_start(&self, permit: io::Result<Permit>) -> io::Result<Arc<Watcher>> {
        let mut current = lock(&self.0);
        if let Some(watcher) = current.upgrade() {
            return Ok(watcher);
        }
        let watcher = Watcher::start(permit?)?;
        *current = Arc::downgrade(&watcher);
        Ok(watcher)
    }
}

impl Watcher {
    fn start(permit: Permit) -> io::Result<Arc<Self>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let events: OwnedFd = inotify.as_fd().try_clone_to_owned()?;
        let events = register(events, Interest::READABLE)?;
        Ok(Arc::new_cyclic(|watcher: &Weak<Self>| {
            let watcher = Weak::clone(watcher);
            let read = async move {
                loop {
                    let Ok(mut ready) = events.readable().await else { return };
                    ready.clear_ready();
                    let Some(watcher) = watcher.upgrade() else { return };
                    if !watcher.dispatch() {
                        return;
                    }
                }
            };
            Self { inotify, _permit: permit, routes: Mutex::default(), reader: tokio::spawn(read).abort_handle() }
        }))
    }

    /// Reads all queued events, and notifies their subscriptions. Returns false if the events cannot be read.
    fn dispatch(&self) -> bool {
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    for changes in lock(&self.routes).subscriptions.values() {
                        *lock(&changes.failed) = Some(error);
                        changes.changed.notify_one();
                    }
                    return false;
                }
            };
            let mut routes = lock(&self.routes);
            for event in events {
                let Routes { watches, subscriptions, .. } = &mut *routes;
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    subscriptions.values().for_each(|changes| changes.changed.notify_one());
                    continue;
                }
                for id in watches.get(&event.wd).into_iter().flatten() {
                    if let Some(changes) = subscriptions.get(id) {
                        changes.changed.notify_one();
                    }
                }
                // The directory was removed. The kernel may reuse the watch descriptor.
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    watches.remove(&event.wd);
                }
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Subscription {
    /// Watches a directory.
    ///
    /// # Errors
    /// ENOSPC if the node has no free watch (fs.inotify.max_user_watches), or another error of inotify_add_watch(2).
    pub fn add(&self, directory: &Path) -> io::Result<()> {
        // The lock is held during the call, so that the first event finds the route.
        let mut routes = lock(&self.watcher.routes);
        let watch = self.watcher.inotify.add_watch(directory, CHANGES)?;
        routes.watches.entry(watch).or_default().insert(self.id);
        Ok(())
    }

    /// Waits for a change in the watched directories. Returns at once if there was a change since the last call.
    ///
    /// # Errors
    /// If the events cannot be read.
    pub async fn changed(&self) -> io::Result<()> {
        self.changes.changed.notified().await;
        match *lock(&self.changes.failed) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut routes = lock(&self.watcher.routes);
        routes.subscriptions.remove(&self.id);
        let (id, inotify) = (self.id, &self.watcher.inotify);
        routes.watches.retain(|watch, ids| {
            if ids.remove(&id) && ids.is_empty() {
                // This call fails if the directory was removed, because the kernel has then already removed the watch.
                let _ = inotify.rm_watch(*watch);
            }
            !ids.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    async fn is_silent(subscription: &Subscription) -> bool {
        tokio::time::timeout(Duration::from_millis(50), subscription.changed()).await.is_err()
    }

    #[tokio::test]
    async fn subscriptions_share_an_instance_and_get_only_their_own_changes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let watchers = Watchers::default();
        // Subscriptions that begin at the same time share an instance, too.
        let all = tokio::try_join!(watchers.subscribe(), watchers.subscribe(), watchers.subscribe());
        let (first, both, second) = all.unwrap();
        first.add(one.path()).unwrap();
        both.add(one.path()).unwrap();
        both.add(two.path()).unwrap();
        second.add(two.path()).unwrap();
        fs::write(one.path().join("x"), "").unwrap();
        first.changed().await.unwrap();
        both.changed().await.unwrap();
        assert!(is_silent(&second).await);
        // The watch of `one` stays, because `both` needs it.
        drop(first);
        assert!(is_silent(&both).await);
        fs::remove_file(one.path().join("x")).unwrap();
        both.changed().await.unwrap();
        assert_eq!(lock(&both.watcher.routes).watches.len(), 2);
        fs::remove_dir(one.path()).unwrap();
        both.changed().await.unwrap();
        tokio::task::yield_now().await;
        assert!(Arc::ptr_eq(&both.watcher, &second.watcher));
        let watcher = Arc::downgrade(&second.watcher);
        drop((both, second));
        assert!(watcher.upgrade().is_none());
        assert!(watchers.subscribe().await.is_ok());
    }
}
