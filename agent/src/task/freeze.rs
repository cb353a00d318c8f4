//! Freezes and thaws a container, for the Pause and Resume requests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout, timeout_at};

use super::Container;
use super::process::Phase;
use crate::error::{ServiceError, failed};
use crate::oom::FileWatch;

/// Maximum time to wait until a container is frozen or thawed. This constant and `UNDO_TIMEOUT` together are shorter
/// than the shim's timeout of 10 s. Otherwise, the client would not learn whether the change was undone.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Maximum time to wait until a failed change is undone. If the kernel takes longer, the change is undone later.
const UNDO_TIMEOUT: Duration = Duration::from_secs(1);

/// Freezes or thaws a container. The caller must let this function run to completion, because it undoes a failed
/// change.
pub async fn set(container: &Arc<Container>, frozen: bool) -> Result<(), ServiceError> {
    if !matches!(container.init.phase(), Phase::Running(_) | Phase::Created(_)) {
        return Err(ServiceError::FailedPrecondition("the container is not running".into()));
    }
    let events = container.cgroup.path().join("cgroup.events");
    let watch = FileWatch::new(&events).map_err(failed("watch the freezer state"))?;
    let deadline = Instant::now() + TIMEOUT;
    let mut write = write_freezer(container, frozen);
    let written = timeout_at(deadline, &mut write).await;
    let (hanging, changed) = match written {
        Ok(written) => {
            written.map_err(failed("set the freezer state"))?.map_err(failed("set the freezer state"))?;
            (None, watch.wait_until(deadline, || container.cgroup.is_frozen() == frozen).await)
        }
        Err(_) => (Some(write), Err(io::ErrorKind::TimedOut.into())),
    };
    if let Err(error) = changed {
        let undo = tokio::spawn(undo(container.clone(), hanging, !frozen));
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
fn write_freezer(container: &Arc<Container>, frozen: bool) -> JoinHandle<io::Result<()>> {
    let container = Arc::clone(container);
    spawn_blocking(move || container.cgroup.freeze(frozen))
}

/// Restores the freezer state `frozen`. If the change itself hangs in the kernel, first waits for its end. Otherwise,
/// the change could take effect after this function.
async fn undo(container: Arc<Container>, hanging: Option<JoinHandle<io::Result<()>>>, frozen: bool) {
    if let Some(write) = hanging {
        let _ = write.await;
    }
    if let Ok(Err(error)) = write_freezer(&container, frozen).await {
        tracing::warn!("failed to restore the freezer state of container {}: {error}", container.id);
    }
}
