//! Runs a container in a guest that becomes a template, before the guest is saved.
//!
//! Each guest of the template begins with the creation of a container. After the trial, the kernel has loaded and
//! allocated what this takes. The process that makes the template records which pages the trial touches. Therefore, the
//! trial also does what the Setup request does, if it leaves nothing in the guest.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::GUEST_SHARE;
use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::CreateTaskRequest;
use nix::mount::{MntFlags, umount2};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::error::ServiceError;
use crate::helper;
use crate::sandbox::network::{Network, NetworkConfig, NetworkError};
use crate::sandbox::share::ShareError;
use crate::sandbox::{identity, namespaces, share};
use crate::task::Tasks;

/// The container's id. It can be used again after the trial.
const ID: &str = "trial";
/// Directory with the container's root file system.
const DIR: &str = "/run/husk/trial";
/// How long the container may run.
const EXIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the trial failed.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error("failed to make the root file system of the trial")]
    Rootfs(#[source] io::Error),
    #[error("failed to encode the request of the trial")]
    Encode(#[source] protobuf::Error),
    #[error("failed to mount the share in the trial")]
    Share(#[from] ShareError),
    #[error("failed to unmount the share after the trial")]
    Unmount(#[source] io::Error),
    #[error("failed to read random numbers of the hypervisor in the trial")]
    Random(#[source] io::Error),
    #[error("failed to set up no network in the trial")]
    Network(#[from] NetworkError),
    #[error("failed to enter the pod's namespaces in the trial")]
    Namespaces(#[from] namespaces::NamespaceError),
    #[error("a blocking call of the trial failed")]
    Blocking(#[source] tokio::task::JoinError),
    #[error("failed to run the container of the trial")]
    Container(#[from] ServiceError),
    #[error("the container of the trial has not exited after {} s", EXIT_TIMEOUT.as_secs())]
    Timeout,
}

/// Does what Setup does, and creates, starts and deletes a container. Nothing of it remains.
pub async fn run(tasks: &Arc<Tasks>) -> Result<(), TrialError> {
    set_up().await?;
    let result = run_container(tasks).await;
    // A guest can only be saved if the share is not mounted.
    let unmounted = umount2(GUEST_SHARE, MntFlags::empty()).map_err(|errno| TrialError::Unmount(errno.into()));
    result.and(unmounted)
}

/// Does the parts of the Setup request that leave nothing but the mounted share.
async fn set_up() -> Result<(), TrialError> {
    let blocking = tokio::task::spawn_blocking(|| {
        identity::drop_random_bytes().map_err(TrialError::Random)?;
        share::mount().map_err(TrialError::Share)
    });
    blocking.await.map_err(TrialError::Blocking)??;
    namespaces::run_in_pod(|| ())?;
    Ok(Network::default().apply(NetworkConfig::default()).await?)
}

async fn run_container(tasks: &Arc<Tasks>) -> Result<(), TrialError> {
    let rootfs = Path::new(DIR).join("rootfs");
    fs::create_dir_all(&rootfs).map_err(TrialError::Rootfs)?;
    let program = fs::read_link("/proc/self/exe").map_err(TrialError::Rootfs)?;
    let run = async {
        let options = CreateOptions {
            spec: specification(&program).to_string().into_bytes(),
            rootfs: rootfs.display().to_string(),
            ..Default::default()
        };
        let value = options.write_to_bytes().map_err(TrialError::Encode)?;
        let request = CreateTaskRequest {
            id: ID.to_owned(),
            bundle: DIR.to_owned(),
            options: Some(Any { value, ..Default::default() }).into(),
            ..Default::default()
        };
        tasks.create_own(request).await?;
        let container = tasks.get(ID)?;
        let started = tasks.start_init(&container);
        let exited = tokio::time::timeout(EXIT_TIMEOUT, container.init.wait()).await;
        tasks.delete(ID, "", None).await?;
        started?;
        exited.map(|_| ()).map_err(|_| TrialError::Timeout)
    };
    let result = run.await;
    let removed = fs::remove_dir_all(DIR).map_err(TrialError::Rootfs);
    result.and(removed)
}

/// Returns the specification of a container with what Kubernetes requests for most containers. Its program is this
/// program, which exits at once.
fn specification(program: &Path) -> Value {
    let mount = |target: &str, kind: &str, options: &[&str]| {
        json!({
            "destination": target, "type": kind, "source": kind, "options": options,
        })
    };
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [helper::ARGV0, helper::TRIAL],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
                "effective": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
                "permitted": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
            },
            "oomScoreAdj": 1000,
        },
        "root": { "path": "rootfs" },
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            {
                "destination": format!("/bin/{}", helper::ARGV0), "type": "bind", "source": program,
                "options": ["bind", "ro"],
            },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" },
                { "type": "cgroup" },
            ],
            "resources": { "cpu": { "shares": 2 }, "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
