//! Creates the pod's namespaces, pins them with bind mounts and runs code in them.
//!
//! Namespaces belong to a thread. No function of this module awaits. Therefore no async code runs while a thread is in
//! the pod's namespaces.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::{IPC_NAMESPACE, NET_NAMESPACE, USER_NAMESPACE, UTS_NAMESPACE, loopback};
use crate::helper::{ARGV0, HOLDER};
use crate::id_mappings::IdMappings;

/// Reason why creating or entering namespaces failed.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Failed to open a namespace's file.
    #[error("failed to open {path}")]
    Open {
        path: String,
        #[source]
        source: io::Error,
    },
    /// Failed to create a file or directory for a pinned namespace.
    #[error("failed to create {path}")]
    Create {
        path: String,
        #[source]
        source: io::Error,
    },
    /// Failed to write the id mappings of the user namespace.
    #[error("failed to write the id mappings to {path}")]
    Write {
        path: String,
        #[source]
        source: io::Error,
    },
    /// Failed to start the process that holds the namespaces.
    #[error("failed to start the process that holds the pod's namespaces")]
    Spawn(#[source] io::Error),
    /// Failed to create, enter or pin a namespace.
    #[error("failed to {action}")]
    Kernel {
        /// Action that failed: verb and object.
        action: &'static str,
        #[source]
        source: nix::Error,
    },
}

const KINDS: &[(&str, CloneFlags, &str)] = &[
    ("/proc/thread-self/ns/net", CloneFlags::CLONE_NEWNET, NET_NAMESPACE),
    ("/proc/thread-self/ns/ipc", CloneFlags::CLONE_NEWIPC, IPC_NAMESPACE),
    ("/proc/thread-self/ns/uts", CloneFlags::CLONE_NEWUTS, UTS_NAMESPACE),
];

fn open(path: &str) -> Result<File, NamespaceError> {
    File::open(path).map_err(|source| NamespaceError::Open { path: path.to_owned(), source })
}

fn kernel_error(action: &'static str) -> impl Fn(nix::Error) -> NamespaceError {
    move |source| NamespaceError::Kernel { action, source }
}

/// Returns the agent to its own namespaces when dropped.
struct NamespaceGuard(Vec<(File, CloneFlags)>);

impl NamespaceGuard {
    /// Opens the current namespaces of the calling thread.
    fn save() -> Result<Self, NamespaceError> {
        KINDS.iter().map(|(current, flag, _)| Ok((open(current)?, *flag))).collect::<Result<_, _>>().map(Self)
    }
}

impl Drop for NamespaceGuard {
    fn drop(&mut self) {
        for (file, flag) in &self.0 {
            if let Err(error) = setns(file.as_fd(), *flag) {
                crate::fatal::die(&format!("failed to return to the agent's namespaces: {error}"));
            }
        }
    }
}

/// Creates the pod's network, IPC and UTS namespaces. If `id_mappings` is given, also creates the user namespace that
/// owns these namespaces.
pub fn create(id_mappings: Option<&IdMappings>) -> Result<(), NamespaceError> {
    let directory = "/run/husk/ns";
    fs::create_dir_all(directory).map_err(|source| NamespaceError::Create { path: directory.into(), source })?;
    if let Some(id_mappings) = id_mappings {
        create_in_user_namespace(id_mappings)?;
        if let Err(error) = run_in_pod(loopback::bring_up)? {
            tracing::warn!("failed to bring up lo in the pod: {error}");
        }
        return Ok(());
    }
    let guard = NamespaceGuard::save()?;
    unshare(KINDS.iter().fold(CloneFlags::empty(), |all, kind| all | kind.1))
        .map_err(kernel_error("create the pod's namespaces"))?;
    for (current, _, pin) in KINDS {
        pin_namespace(current, pin)?;
    }
    if let Err(error) = loopback::bring_up() {
        tracing::warn!("failed to bring up lo in the pod: {error}");
    }
    drop(guard);
    Ok(())
}

/// Creates the namespaces in another process, the holder, which keeps the namespaces alive until the agent has pinned
/// them. The agent does not enter the user namespace itself, because it would lose its privileges outside that
/// namespace.
fn create_in_user_namespace(id_mappings: &IdMappings) -> Result<(), NamespaceError> {
    let all = KINDS.iter().fold(CloneFlags::CLONE_NEWUSER, |all, kind| all | kind.1);
    let mut holder = spawn(&[HOLDER], Stdio::null(), move || unshare(all)).map_err(NamespaceError::Spawn)?;
    let result = (|| {
        let proc = format!("/proc/{}", holder.id());
        for (name, text) in [("uid_map", id_mappings.uid_map()), ("gid_map", id_mappings.gid_map())] {
            let path = format!("{proc}/{name}");
            fs::write(&path, text).map_err(|source| NamespaceError::Write { path, source })?;
        }
        pin_namespace(&format!("{proc}/ns/user"), USER_NAMESPACE)?;
        KINDS.iter().try_for_each(|(current, _, pin)| pin_namespace(&current.replace("/proc/thread-self", &proc), pin))
    })();
    // The reaper waits for the killed holder.
    if let Err(error) = holder.kill() {
        tracing::warn!("failed to kill the namespace holder: {error}");
    }
    result
}

/// Spawns the helper with the arguments `args`. The new process calls `enter` before it executes the helper. `enter`
/// has finished when this function returns.
///
/// Only the async thread, which also reaps all children, may call this function. If execve(2) fails, [`Command::spawn`]
/// waits for the child itself. It panics if another thread has reaped the child.
pub(super) fn spawn(
    args: &[&str],
    stdout: Stdio,
    enter: impl FnMut() -> nix::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    let mut enter = enter;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(ARGV0).args(args).env_clear();
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null());
    // SAFETY: `enter` makes only system calls. It takes no lock that another thread could hold.
    unsafe { command.pre_exec(move || Ok(enter()?)) };
    command.spawn()
}

fn pin_namespace(namespace: &str, pin: &str) -> Result<(), NamespaceError> {
    match umount2(pin, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // EINVAL and ENOENT mean that nothing is pinned at this path yet.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => return Err(kernel_error("unmount a pinned namespace")(error)),
    }
    File::create(pin).map_err(|source| NamespaceError::Create { path: pin.to_owned(), source })?;
    mount(Some(namespace), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(kernel_error("pin a namespace"))
}

/// Runs `f` in the pod's namespaces. `f` must not block.
pub fn run_in_pod<T>(f: impl FnOnce() -> T) -> Result<T, NamespaceError> {
    let pins =
        KINDS.iter().map(|(_, flag, pin)| Ok((open(pin)?, *flag))).collect::<Result<Vec<_>, NamespaceError>>()?;
    let guard = NamespaceGuard::save()?;
    for (pin, flag) in &pins {
        setns(pin.as_fd(), *flag).map_err(kernel_error("enter the pod's namespaces"))?;
    }
    let result = f();
    drop(guard);
    Ok(result)
}
