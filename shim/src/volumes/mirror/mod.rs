//! Mirrored volumes: ConfigMaps, Secrets, projected and downward API volumes, which the shim copies to the guest.
//!
//! These volumes are not in the share, because inotify(7) in the guest does not report the host's changes to files in
//! the share. Instead, the agent keeps a copy on a file system of the guest. After each change on the host, the shim
//! sends the volume to the agent. The shim mirrors only read-only mounts. Therefore, the shim copies nothing from the
//! guest to the host. Only the guest's memory limits the number and size of the files.

mod instance_limit;
mod walk;
mod watch;
mod watcher;

use std::convert::identity;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::{MirrorEntry, UpdateMirrorRequest};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstat;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::blocking;
use crate::host_view::HostView;
use crate::oci::IdMappings;
use crate::vm::agent::{Agent, timeouts, within};
use crate::volumes::mirror::watch::Watch;

pub use watcher::Watchers;

/// Names of the directories that contain mirrored volumes, below a pod's directory `volumes`. Each name is an escaped
/// plugin name (Kubernetes, pkg/volume/{configmap,secret,projected,downwardapi}).
const PLUGIN_DIRS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];

/// Maximum number of attempts to copy a volume that changes during the copy. The limit is rarely reached, because the
/// kubelet changes a volume only about once a minute.
const MAX_ATTEMPTS: u32 = 10;
/// Delay before the retry of a failed copy. For example, a copy fails if the guest has no free memory.
const RETRY_DELAY: Duration = Duration::from_secs(10);

/// A volume's directory on the host.
///
/// The shim opens the directory once, before it checks the mount. After the check, the shim does not open the path
/// again, because a tenant with write access to a parent directory could have replaced the directory.
#[derive(Debug, Clone)]
pub struct Volume {
    /// A detached mount of the directory. An fd on the host's mount would make the host's umount(2) fail with EBUSY.
    root: Arc<OwnedFd>,
    path: PathBuf,
}

impl Volume {
    /// Returns the volume with the directory `root` of the host, which was opened at `path`.
    ///
    /// # Errors
    /// The errors of open_tree(2) and mount_setattr(2).
    pub fn new(root: &OwnedFd, path: PathBuf, host: &HostView) -> io::Result<Self> {
        Ok(Self { root: Arc::new(host.clone_tree(root, false, libc::MS_PRIVATE)?), path })
    }

    /// Returns the path at which the directory was opened.
    #[cfg(test)]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file or directory at `path`, which is relative to the volume's root. Does not follow symlinks, and
    /// does not enter other mounts.
    fn open(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        // openat2(2) does not accept an empty path.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        Ok(openat2(&*self.root, path, how)?)
    }

    /// Returns false if the directory has been removed.
    fn exists(&self) -> bool {
        fstat(&self.root).is_ok_and(|stat| stat.st_nlink > 0)
    }
}

/// A mirrored volume of a container.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// The directory on the host.
    pub source: Volume,
    /// Id mappings, if the mount is id-mapped.
    pub id_mappings: Option<IdMappings>,
    /// Index of the mount in the container's specification.
    pub mount: u32,
}

/// Error from mirroring a volume.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The volume cannot be read.
    #[error("failed to read the volume {path}")]
    Read {
        /// Path of the volume.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// New directories of the volume cannot be watched.
    #[error("failed to watch the directories of the volume {path} (see fs.inotify.max_user_watches)")]
    Watch {
        /// Path of the volume.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A request to the agent failed.
    #[error("failed to copy the volume {path} to the guest")]
    Send {
        /// Path of the volume.
        path: PathBuf,
        /// The cause.
        #[source]
        source: ttrpc::Error,
    },
}

impl MirrorError {
    /// Returns whether a change of the volume during the copy may have caused this error. In this case, an immediate
    /// retry may succeed.
    ///
    /// After other errors, immediate retries would only delay the caller.
    fn is_transient(&self) -> bool {
        match self {
            Self::Read { source, .. } => source.kind() != io::ErrorKind::InvalidData,
            // inotify_add_watch(2) fails with ENOSPC if the limit of watches is reached.
            Self::Watch { source, .. } => source.raw_os_error() != Some(libc::ENOSPC),
            Self::Send { .. } => false,
        }
    }

    /// Returns whether this failure of an update is logged as a warning. `failures` is the number of failed attempts
    /// since the last success, including this attempt.
    ///
    /// A failure that persists is logged as a warning only once. The first transient failure is not logged as a
    /// warning, because the next attempt probably succeeds.
    fn is_warning(&self, failures: u32) -> bool {
        failures == if self.is_transient() { 2 } else { 1 }
    }
}

/// Returns whether `path` is the path of a mirrored volume of the pod with uid `pod`:
/// `…/<uid>/volumes/<plugin>/<name>`. `path` must not contain symlinks.
pub fn is_mirrored_volume(path: &Path, pod: &str) -> bool {
    let mut above = path.ancestors().skip(1).map(|directory| directory.file_name().and_then(OsStr::to_str));
    let (plugin, volumes, uid) = (above.next().flatten(), above.next().flatten(), above.next().flatten());
    !pod.is_empty()
        && uid == Some(pod)
        && volumes == Some("volumes")
        && plugin.is_some_and(|plugin| PLUGIN_DIRS.contains(&plugin))
}

/// Returns the guest path of the copy. `mount` is the mount's index in the specification of `container`.
pub fn guest_path(container: &str, mount: usize) -> String {
    format!("{}/{container}/{mount}", husk_proto::GUEST_MIRRORS)
}

/// Copies `mirrors` to the guest. Returns a set of tasks that keep the copies up to date until the set is dropped.
///
/// # Errors
/// [`MirrorError`] if a volume cannot be copied. If a volume cannot be watched, logs a warning and copies the volume
/// only once.
pub async fn start(
    watchers: &Watchers,
    agent: &Agent,
    container: &str,
    mirrors: Vec<Mirror>,
) -> Result<JoinSet<()>, MirrorError> {
    let mut tasks = JoinSet::new();
    for mirror in mirrors {
        // Create the watch before the copy, so that no change between these steps is missed.
        let watch = Watch::new(watchers, &mirror.source).await;
        copy(agent, container, &mirror).await?;
        match watch {
            Ok(watch) => drop(tasks.spawn(keep_updated(agent.clone(), container.to_owned(), mirror, watch))),
            Err(error) => tracing::warn!(
                container, volume = %mirror.source.path.display(), %error,
                "failed to watch a volume: its later changes do not reach the guest"
            ),
        }
    }
    Ok(tasks)
}

/// Copies a volume after each change. Returns after the volume is removed, or if the shim cannot read the volume's
/// inotify events.
async fn keep_updated(agent: Agent, container: String, mirror: Mirror, mut watch: Watch) {
    let volume = mirror.source.path.display().to_string();
    let mut failures: u32 = 0;
    loop {
        tokio::select! {
            changed = watch.changed() => if let Err(error) = changed {
                tracing::warn!(
                    container, volume, %error,
                    "failed to read the events of a volume: its later changes do not reach the guest"
                );
                return;
            },
            () = tokio::time::sleep(RETRY_DELAY), if failures > 0 => {}
        }
        let watched = watch.add_new_directories().await;
        let watched = watched.map_err(|source| MirrorError::Watch { path: mirror.source.path.clone(), source });
        // Copy the changes even if new directories cannot be watched.
        let copied = copy(&agent, &container, &mirror).await;
        match watched.and(copied) {
            Ok(()) => {
                failures = 0;
                tracing::debug!(container, volume, "copied the changes of a volume");
            }
            Err(_) if !mirror.source.exists() => {
                tracing::debug!(container, volume, "stopped watching a volume, because it was removed");
                return;
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                let is_warning = error.is_warning(failures);
                let error = crate::chain(&error);
                if is_warning {
                    tracing::warn!(container, error, "failed to update the guest's copy of a volume; retrying");
                } else {
                    tracing::debug!(container, error, "failed to update the guest's copy of a volume; retrying");
                }
            }
        }
    }
}

/// Copies the current state of a volume. Retries if the volume changes during the copy.
async fn copy(agent: &Agent, container: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    for _ in 1..MAX_ATTEMPTS {
        match copy_once(agent, container, mirror).await {
            Err(error) if error.is_transient() && mirror.source.exists() => {}
            result => return result,
        }
    }
    copy_once(agent, container, mirror).await
}

async fn copy_once(agent: &Agent, container: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    let (sender, mut batches) = mpsc::channel::<Vec<MirrorEntry>>(1);
    let source = mirror.source.clone();
    let walk = blocking::spawn(move || walk::walk(&source, |batch| sender.blocking_send(batch).is_ok()));
    let send = async |entries, last| {
        let request = UpdateMirrorRequest {
            container_id: container.to_owned(),
            mount: mirror.mount,
            entries,
            last,
            ..Default::default()
        };
        let sent = agent.sandbox.update_mirror(within(timeouts::SLOW), &request).await;
        sent.map(drop).map_err(|source| MirrorError::Send { path: mirror.source.path.clone(), source })
    };
    while let Some(mut batch) = batches.recv().await {
        if let Some(id_mappings) = &mirror.id_mappings {
            batch.iter_mut().for_each(|entry| map_owner(entry, id_mappings));
        }
        send(batch, false).await?;
    }
    let walked = walk.await.and_then(identity);
    walked.map_err(|source| MirrorError::Read { path: mirror.source.path.clone(), source })?;
    // This message completes the copy. The agent then removes old entries that the copy does not contain.
    send(Vec::new(), true).await
}

/// Replaces the owner of `entry` with the owner that an id-mapped mount would show.
fn map_owner(entry: &mut MirrorEntry, id_mappings: &IdMappings) {
    (entry.uid, entry.gid) = id_mappings.owner(entry.uid, entry.gid);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::test_support::{isolated, tmpfs};

    fn volume_at(path: &Path) -> Volume {
        let host = HostView::own();
        Volume::new(&host.open(path, false).unwrap(), path.to_owned(), &host).unwrap()
    }

    #[test]
    fn host_can_unmount_a_volume_that_is_open() {
        isolated(|dir| {
            tmpfs(&dir.join("v"));
            std::fs::write(dir.join("v/key"), "").unwrap();
            tmpfs(&dir.join("v/below"));
            let volume = volume_at(&dir.join("v"));
            nix::mount::umount(&dir.join("v/below")).unwrap();
            nix::mount::umount(&dir.join("v")).unwrap();
            assert!(volume.exists() && volume.open(Path::new("key"), OFlag::O_RDONLY).is_ok());
        });
    }

    #[tokio::test(start_paused = true)]
    async fn keep_updated_retries_until_the_volume_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let watch = Watch::new(&Watchers::default(), &volume_at(dir.path())).await.unwrap();
        // This volume is a file instead of a directory. Therefore, the shim can neither watch nor copy the volume.
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let mirror = Mirror { source: volume_at(&path), id_mappings: None, mount: 0 };
        let agent = Agent::new(std::os::unix::net::UnixStream::pair().unwrap().0).unwrap();
        let mut updates = tokio::spawn(keep_updated(agent, "c".into(), mirror, watch));
        let ended = tokio::time::timeout(RETRY_DELAY * 3, &mut updates).await;
        assert!(ended.is_err(), "the updates ended although the volume exists");
        std::fs::remove_file(&path).unwrap();
        tokio::time::timeout(RETRY_DELAY * 3, updates).await.unwrap().unwrap();
    }

    #[test]
    fn persistent_failures_are_logged_as_a_warning_once() {
        let watch = |source: io::Error| MirrorError::Watch { path: "/v".into(), source };
        let warnings = |error: MirrorError| (1..5).filter(|n| error.is_warning(*n)).collect::<Vec<_>>();
        assert_eq!(warnings(watch(io::ErrorKind::NotFound.into())), [2]);
        assert_eq!(warnings(watch(io::Error::from_raw_os_error(libc::ENOSPC))), [1]);
        assert_eq!(warnings(MirrorError::Send { path: "/v".into(), source: ttrpc::Error::LocalClosed }), [1]);
    }

    #[test]
    fn is_transient_accepts_read_errors_except_invalid_data() {
        let read = |kind: io::ErrorKind| MirrorError::Read { path: "/v".into(), source: kind.into() };
        assert!(read(io::ErrorKind::Interrupted).is_transient());
        assert!(read(io::ErrorKind::NotFound).is_transient());
        assert!(!read(io::ErrorKind::InvalidData).is_transient());
        let send = MirrorError::Send { path: "/v".into(), source: ttrpc::Error::LocalClosed };
        assert!(!send.is_transient());
    }

    #[test]
    fn is_mirrored_volume_checks_pod_and_plugin() {
        let is_mirrored = |path: &str| is_mirrored_volume(Path::new(&format!("/var/lib/kubelet/pods/{path}")), "5e1c");
        assert!(is_mirrored("5e1c/volumes/kubernetes.io~configmap/settings"));
        assert!(is_mirrored("5e1c/volumes/kubernetes.io~projected/kube-api-access-x"));
        assert!(!is_mirrored("5e1d/volumes/kubernetes.io~configmap/settings"));
        assert!(!is_mirrored("5e1c/volumes/kubernetes.io~empty-dir/cache"));
        assert!(!is_mirrored("5e1c/volumes/kubernetes.io~configmap"));
        assert!(!is_mirrored_volume(Path::new("/volumes/kubernetes.io~configmap/x"), ""));
    }
}
