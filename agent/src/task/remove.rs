//! Delete: of a process made by Exec, or of a container with everything it left in the guest.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::error::Fault;
use super::process::Phase;
use super::{Container, STATE, Tasks, volumes};
use crate::oom::FileWatch;
use crate::reaper::Ended;

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

impl Tasks {
    /// Deletes a container or one of its processes, which must have ended.
    ///
    /// # Errors
    /// [`Fault`] when it has not, or there is none.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(i32, Ended), Fault> {
        let container = self.get(id)?;
        let process = container.process(exec_id)?;
        let (pid, ended) = match process.phase() {
            Phase::Stopped(pid, ended) => (pid, ended),
            Phase::New if !exec_id.is_empty() => (0, Ended { status: 0, at_ns: 0 }),
            Phase::Created(_) if exec_id.is_empty() => {
                // As with runc, what was created and never started is killed by its deletion.
                let _ = container.cgroup.kill();
                process.wait().await.ok_or_else(|| Fault::Unknown("the process did not end".into()))?
            }
            _ => return Err(Fault::FailedPrecondition("cannot delete a running process".into())),
        };
        if exec_id.is_empty() {
            self.clean(&container).await;
            self.forget(id);
        } else {
            container.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(exec_id);
        }
        Ok((pid, ended))
    }

    /// Ends and removes whatever there is of a container.
    pub(super) async fn clean(&self, container: &Arc<Container>) {
        if let Some(watching) = container.oom_task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The kernel does not tell a watch that a control group's file is gone.
            watching.abort();
        }
        if let Err(error) = remove_group(container).await {
            tracing::warn!("control group of {}: {error}", container.id);
        }
        let mut alone = container.volumes.clone();
        alone.retain(|path| !self.is_shared(path, &container.id));
        let _ = tokio::task::spawn_blocking(move || volumes::leave(&alone)).await;
        crate::sandbox::mirror::remove(&container.id);
        crate::sandbox::volume::remove(&container.id);
        for path in [&container.dir, &Path::new(STATE).join(&container.id)] {
            match std::fs::remove_dir_all(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!("{}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}

async fn remove_group(container: &Container) -> std::io::Result<()> {
    let group = &container.cgroup;
    if !group.path().exists() {
        return Ok(());
    }
    if group.is_populated() {
        let watch = FileWatch::new(&group.path().join("cgroup.events"))?;
        group.kill()?;
        let deadline = Instant::now() + PATIENCE;
        while group.is_populated() {
            if timeout_at(deadline, watch.changed()).await.is_err() {
                break;
            }
        }
    }
    group.remove()
}
