//! Delete: of a process made by Exec, or of a container with everything it left in the guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::error::Fault;
use super::process::Phase;
use super::{Container, STATE, Tasks};
use crate::oom::FileWatch;
use crate::reaper::ProcessExit;
use crate::sandbox::volume;

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

impl Tasks {
    /// Deletes a container or one of its processes, which must have ended.
    ///
    /// # Errors
    /// [`Fault`] when it has not, or there is none.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(i32, ProcessExit), Fault> {
        let container = match self.get(id) {
            Err(fault) if exec_id.is_empty() => {
                // It was never made, or not to its end: its volumes may be here already.
                self.remove_volumes(id, Vec::new()).await;
                return Err(fault);
            }
            container => container?,
        };
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            // Whoever had it made has lost patience; what is half made cannot be taken apart.
            process.settled().await;
        }
        let (pid, ended) = match process.phase() {
            Phase::Stopped(pid, ended) => (pid, ended),
            Phase::New if !exec_id.is_empty() => (0, ProcessExit { status: 0, at_ns: 0 }),
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
        self.remove_volumes(&container.id, container.volumes.clone()).await;
        for path in [&container.dir, &Path::new(STATE).join(&container.id)] {
            match std::fs::remove_dir_all(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!("{}: {error}", path.display());
                }
                _ => {}
            }
        }
    }

    /// Takes away what there is of a container's volumes, and leaves the shared ones that nobody else has; `of` are those
    /// it was made with.
    async fn remove_volumes(&self, id: &str, mut of: Vec<PathBuf>) {
        let (sandbox, container) = (Arc::clone(&self.sandbox), id.to_owned());
        let removed = tokio::task::spawn_blocking(move || {
            sandbox.mirrors.remove(&container);
            volume::remove(&container)
        });
        of.extend(removed.await.unwrap_or_default());
        of.retain(|path| !self.is_shared(path, id));
        let _ = tokio::task::spawn_blocking(move || volume::leave(of)).await;
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::process::{Process, StreamNames};
    use super::*;
    use crate::cgroup::Cgroup;
    use crate::events::Hub;
    use crate::oom::OomWatch;

    fn container(id: &str) -> Arc<Container> {
        let cgroup = Cgroup::of(id);
        Arc::new(Container {
            id: id.to_owned(),
            bundle: String::new(),
            oom: Arc::new(OomWatch::new(id, cgroup.clone(), Hub::default())),
            cgroup,
            init: Process::new("", StreamNames::default(), None),
            dir: std::env::temp_dir().join(id),
            seccomp: None,
            oom_score_adj: None,
            shares_pids: false,
            volumes: Vec::new(),
            oom_task: Mutex::default(),
            paused: false.into(),
            execs: Mutex::default(),
        })
    }

    #[tokio::test]
    async fn a_container_that_is_being_made_is_deleted_when_it_is_made() {
        let tasks = Tasks::new(Hub::default(), Default::default(), Default::default(), Default::default());
        let (made, failed) = (container("husk-test-made"), container("husk-test-failed"));
        for (container, last) in [(&made, Phase::Created(7)), (&failed, Phase::New)] {
            tasks.insert(container).unwrap();
            let deleting = tasks.delete(&container.id, "");
            tokio::pin!(deleting);
            tokio::select! {
                biased;
                _ = &mut deleting => panic!("deleted before it was made"),
                () = tokio::task::yield_now() => container.init.advance(last),
            }
            tokio::select! {
                biased;
                _ = &mut deleting => panic!("deleted before its process ended"),
                () = tokio::task::yield_now() => {}
            }
            container.init.advance(Phase::Stopped(7, ProcessExit { status: 137, at_ns: 1 }));
            assert_eq!(deleting.await.unwrap(), (7, ProcessExit { status: 137, at_ns: 1 }));
            assert!(tasks.get(&container.id).is_err());
        }
    }
}
