//! Updates the mounts in a pod's volumes. Each volume is updated in a separate task, so that a volume that hangs does
//! not delay other volumes.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{Id, JoinSet};
use tokio::time::Instant;

use crate::blocking;

/// Duration after which an update counts as hanging. Requests do not wait for an update that hangs. Normally, an update
/// takes milliseconds.
const HANG_TIMEOUT: Duration = Duration::from_secs(1);

/// Function that updates the mounts of the volume with the given name. The function may block.
type Update = Arc<dyn Fn(&OsStr) -> Result<(), String> + Send + Sync>;

/// The updates of a pod's volumes.
///
/// Each volume has at most one update in progress. If a request arrives during this update, another update of the
/// volume follows.
pub struct Updates {
    update: Update,
    tasks: JoinSet<Result<(), String>>,
    in_progress: HashMap<Id, InProgress>,
    /// Number of the latest request.
    requested: u64,
}

struct InProgress {
    volume: OsString,
    started: Instant,
    /// Number of the request that the update serves.
    request: u64,
    /// Number of the latest request that does not have to wait for this volume.
    served: u64,
    /// Whether a request for the volume has arrived since the update started.
    again: bool,
    hangs: bool,
}

impl Updates {
    /// Returns an instance that calls `update` for each volume.
    pub fn new(update: impl Fn(&OsStr) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self { update: Arc::new(update), tasks: JoinSet::new(), in_progress: HashMap::new(), requested: 0 }
    }

    /// Starts to serve request number `request`, which updates every volume. `volumes` lists all volumes that exist.
    pub fn start(&mut self, mut volumes: Vec<OsString>, request: u64) {
        let previous = std::mem::replace(&mut self.requested, request);
        for update in self.in_progress.values_mut() {
            match volumes.iter().position(|volume| *volume == update.volume) {
                Some(index) => {
                    volumes.swap_remove(index);
                    update.again = true;
                }
                // The volume was removed.
                None => (update.again, update.served) = (false, request),
            }
            let elapsed = update.started.elapsed();
            if elapsed >= HANG_TIMEOUT {
                update.served = request;
                if !std::mem::replace(&mut update.hangs, true) {
                    let volume = update.volume.display();
                    tracing::warn!(%volume, ?elapsed, "the update of a volume's mounts hangs");
                }
            }
        }
        for volume in volumes {
            self.spawn(volume, previous);
        }
    }

    fn spawn(&mut self, volume: OsString, served: u64) {
        let (update, name) = (Arc::clone(&self.update), volume.clone());
        let task = self.tasks.spawn(async move {
            blocking::spawn(move || update(&name)).await.unwrap_or_else(|error| Err(error.to_string()))
        });
        let (started, request) = (Instant::now(), self.requested);
        self.in_progress.insert(task.id(), InProgress { volume, started, request, served, again: false, hangs: false });
    }

    /// Waits until an update ends, and returns its result. If a request for the volume arrived during the update,
    /// starts another update of the volume. Returns `None` if no update is in progress.
    pub async fn ended(&mut self) -> Option<Result<(), String>> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok(ended) => ended,
            Err(error) => (error.id(), Err(error.to_string())),
        };
        if let Some(ended) = self.in_progress.remove(&id)
            && ended.again
        {
            self.spawn(ended.volume, ended.served.max(ended.request));
        }
        Some(result)
    }

    /// Returns the number of the latest request that is complete for all volumes. Ignores volumes whose update hangs.
    pub fn served(&self) -> u64 {
        self.in_progress.values().map(|update| update.served).min().unwrap_or(self.requested)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;

    use super::*;

    /// Returns `Updates` whose updates of the volume `hung` wait for a message. Also returns the sender of the
    /// messages, and the list of started updates.
    fn updates() -> (Updates, mpsc::Sender<()>, Arc<Mutex<Vec<OsString>>>) {
        let (sender, receiver) = mpsc::channel();
        let (receiver, started) = (Mutex::new(receiver), Arc::new(Mutex::new(Vec::new())));
        let log = Arc::clone(&started);
        let updates = Updates::new(move |volume| {
            log.lock().unwrap().push(volume.to_owned());
            if volume == "hung" {
                receiver.lock().unwrap().recv().unwrap();
            }
            Ok(())
        });
        (updates, sender, started)
    }

    fn volumes() -> Vec<OsString> {
        ["hung", "other"].map(OsString::from).to_vec()
    }

    fn count(started: &Mutex<Vec<OsString>>, volume: &str) -> usize {
        started.lock().unwrap().iter().filter(|found| *found == volume).count()
    }

    #[tokio::test]
    async fn request_during_an_update_starts_another_update() {
        let (mut updates, hung, started) = updates();
        for request in 1..=3 {
            updates.start(volumes(), request);
            updates.ended().await.unwrap().unwrap();
            assert_eq!(count(&started, "other"), usize::try_from(request).unwrap());
        }
        assert!(count(&started, "hung") <= 1);
        assert_eq!(updates.served(), 0);
        hung.send(()).unwrap();
        updates.ended().await.unwrap().unwrap();
        assert_eq!(updates.served(), 1);
        // One update serves all requests that were made during the first update.
        hung.send(()).unwrap();
        updates.ended().await.unwrap().unwrap();
        assert_eq!((updates.served(), count(&started, "hung")), (3, 2));
        assert!(updates.ended().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_do_not_wait_for_a_volume_that_hangs() {
        let (mut updates, hung, started) = updates();
        updates.start(volumes(), 1);
        updates.ended().await.unwrap().unwrap();
        tokio::time::advance(HANG_TIMEOUT).await;
        updates.start(volumes(), 2);
        updates.ended().await.unwrap().unwrap();
        assert_eq!(updates.served(), 2);
        // After the hanging update has ended, requests wait for the volume `hung` again.
        hung.send(()).unwrap();
        updates.ended().await.unwrap().unwrap();
        updates.start(volumes(), 3);
        updates.ended().await.unwrap().unwrap();
        assert_eq!(updates.served(), 2);
        for _ in 0..2 {
            hung.send(()).unwrap();
            updates.ended().await.unwrap().unwrap();
        }
        assert_eq!((updates.served(), count(&started, "hung")), (3, 3));
    }

    #[tokio::test]
    async fn a_removed_volume_is_not_updated_again() {
        let (mut updates, hung, started) = updates();
        updates.start(volumes(), 1);
        updates.ended().await.unwrap().unwrap();
        updates.start(vec!["other".into()], 2);
        updates.ended().await.unwrap().unwrap();
        assert_eq!(updates.served(), 2);
        hung.send(()).unwrap();
        updates.ended().await.unwrap().unwrap();
        assert!(updates.ended().await.is_none());
        assert_eq!(count(&started, "hung"), 1);
    }

    #[tokio::test]
    async fn update_that_panics_returns_an_error() {
        let mut updates = Updates::new(|_| panic!("test"));
        updates.start(vec!["a".into()], 1);
        assert!(updates.ended().await.unwrap().is_err());
        assert_eq!(updates.served(), 1);
    }
}
