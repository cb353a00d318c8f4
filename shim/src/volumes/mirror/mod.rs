//! Volumes whose changes a pod is to notice (ConfigMaps, Secrets, projected ones): copied into the guest and followed.
//!
//! Over a shared file system the guest would see a change when it looks, but inotify(7) would never tell it. So these
//! volumes, which no pod writes to, are not shared at all: their files go to the agent, which keeps a copy on a file
//! system of the guest's own, and every change on the host is carried over. There is no limit on entries or sizes but
//! memory.

mod walk;
mod watch;

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::{MirrorEntry, MirrorRequest};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstat;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::oci::IdMappings;
use crate::vm::agent::{Agent, timeouts, within};
use crate::volumes::mirror::watch::Watch;

/// The kubelet's directories of the volumes that it fills and keeps up to date, beneath a pod's `volumes`
/// (Kubernetes, pkg/volume/{configmap,secret,projected,downwardapi}: `kubernetes.io/<plugin>`, escaped).
const PLUGIN_DIRS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];

/// How often a volume may change while it is looked at: the kubelet does it about once a minute.
const MAX_ATTEMPTS: u32 = 10;
/// After which a copy that the guest refused, for want of memory perhaps, is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(10);

/// The directory of a volume on the host.
///
/// It is opened once, when the mount is checked. A tenant who can write above it could put another one at its path later.
#[derive(Debug, Clone)]
pub struct Volume {
    root: Arc<OwnedFd>,
    path: PathBuf,
}

impl Volume {
    /// The directory `root`, an O_PATH fd, opened at `path`.
    pub fn new(root: OwnedFd, path: PathBuf) -> Self {
        Self { root: Arc::new(root), path }
    }

    /// The path, for messages only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file or directory of the volume at `path`, relative to its root. No symlink is followed, and no other file
    /// system is entered.
    fn open(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        // openat2(2) takes no empty path.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        Ok(openat2(&*self.root, path, how)?)
    }

    /// Whether the directory is still linked in its file system.
    fn exists(&self) -> bool {
        fstat(&self.root).is_ok_and(|stat| stat.st_nlink > 0)
    }
}

/// A volume that is mirrored.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// The directory on the host.
    pub source: Volume,
    /// Whom its files belong to in the guest, where that is not whom they say.
    pub id_mappings: Option<IdMappings>,
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

/// Whether the directory at `path`, which has no symlinks in it, is one that the kubelet fills for the pod with this uid:
/// `…/<uid>/volumes/<kind>/<name>`.
pub fn is_mirrored_volume(path: &Path, pod: &str) -> bool {
    let mut above = path.ancestors().skip(1).map(|directory| directory.file_name().and_then(OsStr::to_str));
    let (kind, volumes, uid) = (above.next().flatten(), above.next().flatten(), above.next().flatten());
    !pod.is_empty()
        && uid == Some(pod)
        && volumes == Some("volumes")
        && kind.is_some_and(|kind| PLUGIN_DIRS.contains(&kind))
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
    let mut tasks = JoinSet::new();
    for mirror in mirrors {
        // First the watch, then the look: what changes in between is seen twice rather than not at all.
        let watch = Watch::new(&mirror.source).await;
        copy(agent, container, &mirror).await?;
        match watch {
            Ok(watch) => drop(tasks.spawn(keep_updated(agent.clone(), container.to_owned(), mirror, watch))),
            Err(error) => tracing::warn!(
                container, volume = %mirror.source.path.display(), %error,
                "changes of this volume will not be seen in the guest (fs.inotify.max_user_watches?)"
            ),
        }
    }
    Ok(tasks)
}

/// Copies a volume whenever it changes, until it is gone or the task is ended, as it is with its container.
async fn keep_updated(agent: Agent, container: String, mirror: Mirror, mut watch: Watch) {
    let mut retry = false;
    loop {
        tokio::select! {
            changed = watch.changed() => if let Err(error) = changed {
                tracing::warn!(container, volume = %mirror.source.path.display(), %error, "volume is no longer followed");
                return;
            },
            () = tokio::time::sleep(RETRY_DELAY), if retry => {}
        }
        if let Err(error) = watch.add_new_directories(&mirror.source).await {
            tracing::debug!(container, volume = %mirror.source.path.display(), %error, "volume is gone");
            return;
        }
        let copied = copy(&agent, &container, &mirror).await;
        retry = copied.is_err();
        match copied {
            Ok(()) => tracing::debug!(container, volume = %mirror.source.path.display(), "volume's changes copied"),
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
    for _ in 1..MAX_ATTEMPTS {
        match copy_once(agent, container, mirror).await {
            Err(MirrorError::Read { .. }) if mirror.source.exists() => {}
            result => return result,
        }
    }
    copy_once(agent, container, mirror).await
}

async fn copy_once(agent: &Agent, container: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    let (sender, mut batches) = mpsc::channel::<Vec<MirrorEntry>>(1);
    let source = mirror.source.clone();
    let walk = tokio::task::spawn_blocking(move || walk::walk(&source, |batch| sender.blocking_send(batch).is_ok()));
    let send = async |entries, last| {
        let request = MirrorRequest {
            container_id: container.to_owned(),
            mount: mirror.mount,
            entries,
            last,
            ..Default::default()
        };
        let sent = agent.sandbox.mirror(within(timeouts::SLOW), &request).await;
        sent.map(drop).map_err(|source| MirrorError::Send { path: mirror.source.path.clone(), source })
    };
    while let Some(mut batch) = batches.recv().await {
        if let Some(id_mappings) = &mirror.id_mappings {
            batch.iter_mut().for_each(|entry| map_owner(entry, id_mappings));
        }
        send(batch, false).await?;
    }
    let walked = walk.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    walked.map_err(|source| MirrorError::Read { path: mirror.source.path.clone(), source })?;
    // Only a whole look says what is no longer there.
    send(Vec::new(), true).await
}

/// Has an entry belong to whom a mount with mapped ids would show it to.
fn map_owner(entry: &mut MirrorEntry, id_mappings: &IdMappings) {
    (entry.uid, entry.gid) = id_mappings.owner(entry.uid, entry.gid);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_of_the_kubelet_are_recognized_by_pod_and_kind() {
        let is_mirrored = |path: &str| is_mirrored_volume(Path::new(&format!("/var/lib/kubelet/pods/{path}")), "5e1c");
        assert!(is_mirrored("5e1c/volumes/kubernetes.io~configmap/settings"));
        assert!(is_mirrored("5e1c/volumes/kubernetes.io~projected/kube-api-access-x"));
        assert!(!is_mirrored("5e1d/volumes/kubernetes.io~configmap/settings"));
        assert!(!is_mirrored("5e1c/volumes/kubernetes.io~empty-dir/cache"));
        assert!(!is_mirrored("5e1c/volumes/kubernetes.io~configmap"));
        assert!(!is_mirrored_volume(Path::new("/volumes/kubernetes.io~configmap/x"), ""));
    }
}
