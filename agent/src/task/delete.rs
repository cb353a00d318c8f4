//! Deletes an exec, or a container with everything that the container left in the guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use husk_base::error::chain;
use husk_base::sync::lock;
use tokio::time::{Instant, timeout_at};

use super::kill::{self, KILL_TIMEOUT};
use super::process::Phase;
use super::{Container, STATE_DIR, Tasks};
use crate::blocking;
use crate::error::{ServiceError, failed};
use crate::oom::FileWatch;
use crate::reaper::ProcessExit;
use crate::sandbox::volume;

impl Tasks {
    /// Deletes a container or an exec. The process must have exited or must never have been started. Returns the PID
    /// and the exit of the process. The PID is 0 for an exec that never ran. `limit` is the timeout of the request.
    pub async fn delete(
        &self,
        id: &str,
        exec_id: &str,
        limit: Option<Duration>,
    ) -> Result<(i32, ProcessExit), ServiceError> {
        if exec_id.is_empty() {
            self.wait_unreserved(id).await;
        }
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
        let deadline = Instant::now() + kill_timeout(limit);
        if exec_id.is_empty() {
            // A Create of this container may still be running although its client has given up. A container cannot be
            // cleaned up while it is being created. Therefore wait until Create has finished.
            process.wait_created().await;
        }
        let (pid, exit) = match process.phase() {
            Phase::Stopped(pid, exit) => (pid, exit),
            Phase::New if !exec_id.is_empty() => (0, ProcessExit { status: 0, at_ns: 0 }),
            Phase::Created(_) | Phase::Exiting(_) if exec_id.is_empty() => {
                // As with runc, deleting a container that was created but never started kills the container. If the
                // init has exited, its other processes are killed anyway.
                let exit = timeout_at(deadline, async {
                    let _ = kill::all(&container, libc::SIGKILL).await;
                    process.wait().await
                });
                exit.await.ok().flatten().ok_or_else(|| {
                    ServiceError::Unknown("failed to wait for the exit of the killed init of the container".into())
                })?
            }
            _ => return Err(ServiceError::FailedPrecondition("cannot delete a running process".into())),
        };
        if exec_id.is_empty() {
            self.cleanup(&container, deadline).await;
            self.remove(id);
        } else {
            lock(&container.execs).remove(exec_id);
        }
        Ok((pid, exit))
    }

    /// Kills the processes of a container and removes its cgroup, volumes and directories. Best effort. Waits until
    /// `deadline` for the exit of the processes.
    pub(super) async fn cleanup(&self, container: &Arc<Container>, deadline: Instant) {
        if let Some(watch_task) = lock(&container.oom_task).take() {
            // The async task would never end, because inotify does not report the removal of a cgroup file.
            watch_task.abort();
        }
        if let Err(error) = remove_cgroup(container, deadline).await {
            tracing::warn!("failed to remove the cgroup of container {}: {}", container.id, chain(&error));
        }
        self.remove_volumes(&container.id, container.volumes.clone()).await;
        let directories = [container.dir.clone(), Path::new(STATE_DIR).join(&container.id)];
        let _ = tokio::task::spawn_blocking(move || directories.iter().for_each(|path| remove_directory(path))).await;
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

fn remove_directory(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("failed to remove {}: {error}", path.display());
        }
        _ => {}
    }
}

/// Returns how long a request with the timeout `limit` waits for the exit of killed processes.
fn kill_timeout(limit: Option<Duration>) -> Duration {
    limit.map_or(KILL_TIMEOUT, |limit| KILL_TIMEOUT.min(limit / 2))
}

async fn remove_cgroup(container: &Arc<Container>, deadline: Instant) -> Result<(), ServiceError> {
    let cgroup = container.cgroup.clone();
    if !cgroup.path().exists() {
        return Ok(());
    }
    if cgroup.is_populated() {
        let watch = FileWatch::new(&cgroup.path().join("cgroup.events")).map_err(failed("watch the cgroup"))?;
        let killed = timeout_at(deadline, kill::all(container, libc::SIGKILL)).await;
        killed.map_err(failed("kill the processes of the container"))??;
        if let Err(error) = watch.wait_until(deadline, || !cgroup.is_populated()).await {
            tracing::warn!("failed to wait for the end of the processes of container {}: {error}", container.id);
        }
    }
    // A container can have created any number of cgroups.
    blocking::run("remove the cgroup", move || cgroup.remove()).await
}

#[cfg(test)]
mod tests {
    use super::super::hang_tests::container_below;
    use super::*;
    use crate::events::EventHub;

    #[test]
    fn wait_for_killed_processes_ends_before_the_request() {
        assert_eq!(kill_timeout(None), KILL_TIMEOUT);
        assert_eq!(kill_timeout(Some(Duration::from_secs(2))), Duration::from_secs(1));
        assert_eq!(kill_timeout(Some(Duration::from_secs(60))), KILL_TIMEOUT);
    }

    #[tokio::test]
    async fn delete_waits_for_a_container_that_is_being_created() {
        let tasks = Tasks::new(EventHub::default(), Default::default(), Default::default(), Default::default());
        let root = tempfile::tempdir().unwrap();
        let (created, failed) = (container_below(root.path(), "made"), container_below(root.path(), "failed"));
        for (container, last) in [(&created, Phase::Created(7)), (&failed, Phase::New)] {
            tasks.insert(container).unwrap();
            let deleting = tasks.delete(&container.id, "", None);
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
