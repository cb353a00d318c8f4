//! Deletes an exec, or a container with everything that the container left in the guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_base::sync::lock;
use tokio::time::Instant;

use super::process::Phase;
use super::{Container, STATE_DIR, Tasks};
use crate::error::ServiceError;
use crate::oom::FileWatch;
use crate::reaper::ProcessExit;
use crate::sandbox::volume;

/// Maximum time to wait for the exit of killed processes.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Tasks {
    /// Deletes a container or an exec. The process must have exited or must never have been started. Returns the PID
    /// and the exit of the process. The PID is 0 for an exec that never ran.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(i32, ProcessExit), ServiceError> {
        let container = match self.get(id) {
            Err(error) if exec_id.is_empty() => {
                // The container was never created, or creating it failed. Its volumes may exist nevertheless, because
                // the agent mounts volumes before Create.
                self.remove_volumes(id, Vec::new()).await;
                return Err(error);
            }
            container => container?,
        };
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            // A Create of this container may still be running although its client has given up. A container cannot be
            // cleaned up while it is being created. Therefore wait until Create has finished.
            process.wait_created().await;
        }
        let (pid, exit) = match process.phase() {
            Phase::Stopped(pid, exit) => (pid, exit),
            Phase::New if !exec_id.is_empty() => (0, ProcessExit { status: 0, at_ns: 0 }),
            Phase::Created(_) if exec_id.is_empty() => {
                // As with runc, deleting a container that was created but never started kills the container.
                let _ = container.cgroup.kill();
                process
                    .wait()
                    .await
                    .ok_or_else(|| ServiceError::Unknown("failed to wait for the exit of the killed init".into()))?
            }
            _ => return Err(ServiceError::FailedPrecondition("cannot delete a running process".into())),
        };
        if exec_id.is_empty() {
            self.cleanup(&container).await;
            self.remove(id);
        } else {
            lock(&container.execs).remove(exec_id);
        }
        Ok((pid, exit))
    }

    /// Kills the processes of a container and removes its cgroup, volumes and directories. Best effort.
    pub(super) async fn cleanup(&self, container: &Arc<Container>) {
        if let Some(watch_task) = lock(&container.oom_task).take() {
            // The async task would never end, because inotify does not report the removal of a cgroup file.
            watch_task.abort();
        }
        if let Err(error) = remove_cgroup(container).await {
            tracing::warn!("failed to remove the cgroup of container {}: {error}", container.id);
        }
        self.remove_volumes(&container.id, container.volumes.clone()).await;
        for path in [&container.dir, &Path::new(STATE_DIR).join(&container.id)] {
            match std::fs::remove_dir_all(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!("failed to remove {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }

    /// Removes a container's mirrored volumes and subpaths, and unmounts shared volumes that no other container uses.
    /// `volumes` are the volumes of the container's specification that are in the share.
    async fn remove_volumes(&self, id: &str, mut volumes: Vec<PathBuf>) {
        let (sandbox, container) = (Arc::clone(&self.sandbox), id.to_owned());
        let removed = tokio::task::spawn_blocking(move || {
            sandbox.mirrors.remove(&container);
            volume::remove_subpaths(&container)
        });
        volumes.extend(removed.await.unwrap_or_default());
        volumes.retain(|path| !self.is_used_by_another(path, id));
        let _ = tokio::task::spawn_blocking(move || volume::unmount_unused(volumes)).await;
    }
}

async fn remove_cgroup(container: &Container) -> std::io::Result<()> {
    let cgroup = &container.cgroup;
    if !cgroup.path().exists() {
        return Ok(());
    }
    if cgroup.is_populated() {
        let watch = FileWatch::new(&cgroup.path().join("cgroup.events"))?;
        cgroup.kill()?;
        let deadline = Instant::now() + KILL_TIMEOUT;
        if let Err(error) = watch.wait_until(deadline, || !cgroup.is_populated()).await {
            tracing::warn!("failed to wait for the end of the processes of container {}: {error}", container.id);
        }
    }
    cgroup.remove()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::ProcessSpec;
    use super::super::process::{Process, StreamTokens};
    use super::*;
    use crate::cgroup::Cgroup;
    use crate::events::EventHub;
    use crate::oom::OomWatch;

    fn container(id: &str) -> Arc<Container> {
        let cgroup = Cgroup::for_container(id);
        Arc::new(Container {
            id: id.to_owned(),
            bundle: String::new(),
            oom: Arc::new(OomWatch::new(id, cgroup.clone(), EventHub::default())),
            cgroup,
            init: Process::new("", StreamTokens::default(), None),
            process: ProcessSpec::default(),
            dir: std::env::temp_dir().join(id),
            seccomp: None,
            oom_score_adj: None,
            shares_pid_namespace: false,
            volumes: Vec::new(),
            oom_task: Mutex::default(),
            paused: false.into(),
            execs: Mutex::default(),
        })
    }

    #[tokio::test]
    async fn delete_waits_for_a_container_that_is_being_created() {
        let tasks = Tasks::new(EventHub::default(), Default::default(), Default::default(), Default::default());
        let (created, failed) = (container("husk-test-made"), container("husk-test-failed"));
        for (container, last) in [(&created, Phase::Created(7)), (&failed, Phase::New)] {
            tasks.insert(container).unwrap();
            let deleting = tasks.delete(&container.id, "");
            tokio::pin!(deleting);
            tokio::select! {
                biased;
                _ = &mut deleting => panic!("deleted the container before it was created"),
                () = tokio::task::yield_now() => container.init.advance(last),
            }
            tokio::select! {
                biased;
                _ = &mut deleting => panic!("deleted the container before its process exited"),
                () = tokio::task::yield_now() => {}
            }
            container.init.advance(Phase::Stopped(7, ProcessExit { status: 137, at_ns: 1 }));
            assert_eq!(deleting.await.unwrap(), (7, ProcessExit { status: 137, at_ns: 1 }));
            assert!(tasks.get(&container.id).is_err());
        }
    }
}
