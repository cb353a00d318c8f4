//! Freezes and thaws a container, for the Pause and Resume requests.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::sync::lock;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout, timeout_at};

use super::Container;
use super::process::Phase;
use crate::cgroup::Cgroup;
use crate::error::{ServiceError, failed};
use crate::oom::FileWatch;

/// Maximum time to wait until a container is frozen or thawed. This constant and `UNDO_TIMEOUT` together are shorter
/// than the shim's timeout of 10 s. Otherwise, the client would not learn whether the change was undone.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Maximum time to wait until a failed change is undone. If the kernel takes longer, the change is undone later.
const UNDO_TIMEOUT: Duration = Duration::from_secs(1);

/// A change of the freezer state. The number distinguishes it from all other changes of the same container.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Change {
    number: u64,
    frozen: bool,
}

/// The newest change of a container's freezer state. A change that is delayed has no effect if a newer one has begun.
#[derive(Default)]
pub struct Freezer {
    newest: Mutex<Change>,
    /// Held during each write, so that the last write belongs to the newest change.
    writing: Mutex<()>,
}

impl Freezer {
    /// Begins a change.
    fn begin(&self, frozen: bool) -> Change {
        let mut newest = lock(&self.newest);
        *newest = Change { number: newest.number + 1, frozen };
        *newest
    }

    /// Begins the change that undoes `change`. Returns `None` if a newer change has begun.
    fn begin_undo(&self, change: Change) -> Option<Change> {
        let mut newest = lock(&self.newest);
        (*newest == change).then(|| {
            *newest = Change { number: change.number + 1, frozen: !change.frozen };
            *newest
        })
    }

    /// Writes the freezer state, unless a newer change has begun. Returns whether the state was written. Blocks.
    fn write(&self, cgroup: &Cgroup, change: Change) -> io::Result<bool> {
        let _writing = lock(&self.writing);
        if *lock(&self.newest) != change {
            return Ok(false);
        }
        cgroup.freeze(change.frozen).map(|()| true)
    }

    /// Thaws a container that was frozen without a request, unless a request wants the container to be frozen. Blocks.
    pub fn thaw_after_kill(&self, cgroup: &Cgroup) -> io::Result<()> {
        let _writing = lock(&self.writing);
        if lock(&self.newest).frozen { Ok(()) } else { cgroup.freeze(false) }
    }
}

/// Freezes or thaws a container. The caller must let this function run to completion, because it undoes a failed
/// change.
pub async fn set(container: &Arc<Container>, frozen: bool) -> Result<(), ServiceError> {
    if !matches!(container.init.phase(), Phase::Running(_) | Phase::Created(_)) {
        return Err(ServiceError::FailedPrecondition("the container is not running".into()));
    }
    let events = container.cgroup.path().join("cgroup.events");
    let watch = FileWatch::new(&events).map_err(failed("watch the freezer state"))?;
    let deadline = Instant::now() + TIMEOUT;
    let change = container.freezer.begin(frozen);
    let mut write = write_freezer(container, change);
    let written = timeout_at(deadline, &mut write).await;
    let (hanging, changed) = match written {
        Ok(written) => {
            let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
            let was_newest = written.map_err(|error| {
                // The state has not changed, so there is nothing to write.
                container.freezer.begin_undo(change);
                failed("set the freezer state")(error)
            })?;
            if !was_newest {
                return Err(ServiceError::FailedPrecondition("a newer request has replaced this request".into()));
            }
            (None, watch.wait_until(deadline, || container.cgroup.is_frozen() == frozen).await)
        }
        Err(_) => (Some(write), Err(io::ErrorKind::TimedOut.into())),
    };
    if let Err(error) = changed {
        let undo = tokio::spawn(undo(container.clone(), hanging, change));
        let _ = timeout(UNDO_TIMEOUT, undo).await;
        let action = if frozen { "freeze" } else { "thaw" };
        return Err(ServiceError::Unknown(format!(
            "unable to {action} the container: failed to wait for the change of the freezer state: {error}"
        )));
    }
    container.paused.store(frozen, Ordering::Relaxed);
    Ok(())
}

/// Writes the freezer state on another thread, because the kernel takes a lock of the whole cgroup hierarchy
/// (`cgroup_freeze_write` in kernel/cgroup/cgroup.c).
fn write_freezer(container: &Arc<Container>, change: Change) -> JoinHandle<io::Result<bool>> {
    let container = Arc::clone(container);
    spawn_blocking(move || container.freezer.write(&container.cgroup, change))
}

/// Undoes `change`, unless a newer change has begun. If the change itself hangs in the kernel, first waits for its end.
/// Otherwise, the change could take effect after this function.
async fn undo(container: Arc<Container>, hanging: Option<JoinHandle<io::Result<bool>>>, change: Change) {
    if let Some(write) = hanging {
        let _ = write.await;
    }
    let Some(undo) = container.freezer.begin_undo(change) else { return };
    if let Ok(Err(error)) = write_freezer(&container, undo).await {
        tracing::warn!("failed to restore the freezer state of container {}: {error}", container.id);
    }
}
