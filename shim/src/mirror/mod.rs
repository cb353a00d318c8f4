//! Volumes whose changes a pod is to notice (ConfigMaps, Secrets, projected ones): copied into the guest and followed.
//!
//! Over a shared file system the guest would see a change when it looks, but inotify(7) would never tell it. So these
//! volumes, which no pod writes to, are not shared at all: their files go to the agent, which keeps a copy on a file
//! system of the guest's own, and every change on the host is carried over. There is no limit on entries or sizes but
//! memory.

mod walk;
mod watch;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_proto::agent::{MirrorEntry, MirrorRequest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::bundle::Users;
use crate::sandbox::agent::{Agent, timeouts, within};
use watch::Watch;

/// The kubelet's directories of the volumes that it fills and keeps up to date, beneath a pod's `volumes`
/// (Kubernetes, pkg/volume/{configmap,secret,projected,downwardapi}: `kubernetes.io/<plugin>`, escaped).
const KINDS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];

/// How often a volume may change while it is looked at: the kubelet does it about once a minute.
const ATTEMPTS: u32 = 10;
/// After which a copy that the guest refused, for want of memory perhaps, is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// A volume that is mirrored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The directory on the host.
    pub source: PathBuf,
    /// Whom its files belong to in the guest, where that is not whom they say.
    pub users: Option<Users>,
    /// Which of the container's mounts it is.
    pub mount: u32,
}

/// Why a volume cannot be mirrored.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// It cannot be read.
    #[error("reading the volume {path}")]
    Read {
        /// The volume.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent refused it.
    #[error("copying the volume {path} to the guest")]
    Send {
        /// The volume.
        path: PathBuf,
        /// Why.
        #[source]
        source: ttrpc::Error,
    },
}

/// Whether a read-only directory at `path` is one of the kubelet's.
pub fn is_kubelets(path: &Path) -> bool {
    let kind = path.parent().and_then(Path::file_name);
    let volumes = path.parent().and_then(Path::parent).and_then(Path::file_name);
    volumes.is_some_and(|name| name == "volumes") && kind.is_some_and(|name| KINDS.iter().any(|kind| name == *kind))
}

/// Where the guest finds the copy.
pub fn guest_path(container: &str, mount: usize) -> String {
    format!("{}/{container}/{mount}", husk_proto::GUEST_MIRRORS)
}

/// Copies the volumes of a container to the guest; the tasks returned follow them until they are dropped.
///
/// # Errors
/// [`MirrorError`] when one cannot be copied. One that cannot be watched is only copied, and the log says so.
pub async fn start(agent: &Agent, container: &str, mirrors: Vec<Mirror>) -> Result<JoinSet<()>, MirrorError> {
    let mut following = JoinSet::new();
    for mirror in mirrors {
        // First the watch, then the look: what changes in between is seen twice rather than not at all.
        let watch = Watch::new(&mirror.source).await;
        copy(agent, container, &mirror).await?;
        match watch {
            Ok(watch) => drop(following.spawn(follow(agent.clone(), container.to_owned(), mirror, watch))),
            Err(error) => tracing::warn!(
                container, volume = %mirror.source.display(), %error,
                "changes of this volume will not be seen in the guest (fs.inotify.max_user_watches?)"
            ),
        }
    }
    Ok(following)
}

/// Copies a volume whenever it changes, until it is gone or the task is ended, as it is with its container.
async fn follow(agent: Agent, container: String, mirror: Mirror, mut watch: Watch) {
    let mut behind = false;
    loop {
        tokio::select! {
            changed = watch.changed() => if let Err(error) = changed {
                tracing::warn!(container, volume = %mirror.source.display(), %error, "volume is no longer followed");
                return;
            },
            () = tokio::time::sleep(AGAIN), if behind => {}
        }
        if let Err(error) = watch.renew(&mirror.source).await {
            tracing::debug!(container, volume = %mirror.source.display(), %error, "volume is gone");
            return;
        }
        let copied = copy(&agent, &container, &mirror).await;
        behind = copied.is_err();
        match copied {
            Ok(()) => tracing::debug!(container, volume = %mirror.source.display(), "volume's changes copied"),
            // What was replaced while it was read is looked at again.
            Err(error @ MirrorError::Read { .. }) => {
                tracing::debug!(container, error = crate::chain(&error), "volume changed while it was read");
            }
            Err(error) => {
                tracing::warn!(container, error = crate::chain(&error), "volume's changes not copied yet");
            }
        }
    }
}

/// Copies a volume as it is now; one that changes meanwhile is looked at again.
async fn copy(agent: &Agent, container: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    for _ in 1..ATTEMPTS {
        match copy_once(agent, container, mirror).await {
            Err(MirrorError::Read { .. }) if mirror.source.is_dir() => {}
            result => return result,
        }
    }
    copy_once(agent, container, mirror).await
}

async fn copy_once(agent: &Agent, container: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    let (sender, mut batches) = mpsc::channel::<Vec<MirrorEntry>>(1);
    let source = mirror.source.clone();
    let walking = tokio::task::spawn_blocking(move || walk::walk(&source, |batch| sender.blocking_send(batch).is_ok()));
    let send = async |entries, last| {
        let request = MirrorRequest {
            container_id: container.to_owned(),
            mount: mirror.mount,
            entries,
            last,
            ..Default::default()
        };
        let sent = agent.sandbox.mirror(within(timeouts::SLOW), &request).await;
        sent.map(drop).map_err(|source| MirrorError::Send { path: mirror.source.clone(), source })
    };
    while let Some(mut batch) = batches.recv().await {
        if let Some(users) = &mirror.users {
            batch.iter_mut().for_each(|entry| belong(entry, users));
        }
        send(batch, false).await?;
    }
    let walked = walking.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    walked.map_err(|source| MirrorError::Read { path: mirror.source.clone(), source })?;
    // Only a whole look says what is no longer there.
    send(Vec::new(), true).await
}

/// Has an entry belong to whom a mount with mapped ids would show it to.
fn belong(entry: &mut MirrorEntry, users: &Users) {
    (entry.uid, entry.gid) = users.owner(entry.uid, entry.gid);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kubelet_keeps_up_to_date() {
        let pod = "/var/lib/kubelet/pods/5e1c/volumes";
        assert!(is_kubelets(Path::new(&format!("{pod}/kubernetes.io~configmap/settings"))));
        assert!(is_kubelets(Path::new(&format!("{pod}/kubernetes.io~projected/kube-api-access-x"))));
        assert!(!is_kubelets(Path::new(&format!("{pod}/kubernetes.io~empty-dir/cache"))));
        assert!(!is_kubelets(Path::new(&format!("{pod}/kubernetes.io~configmap"))));
        assert!(!is_kubelets(Path::new("/kubernetes.io~configmap/x")));
    }
}
