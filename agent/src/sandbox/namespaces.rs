//! Makes the pod's namespaces, pins them by bind mounts and runs code in them.
//!
//! The agent has one thread, and nothing here waits: entering and leaving is invisible to everything else.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::{IPC, NET, UTS, link};

/// Why namespaces could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A file of a namespace could not be opened or made.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A namespace could not be made, entered or pinned.
    #[error("cannot {action} namespaces")]
    Kernel {
        /// What was being done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: nix::Error,
    },
}

const KINDS: &[(&str, CloneFlags, &str)] = &[
    ("/proc/self/ns/net", CloneFlags::CLONE_NEWNET, NET),
    ("/proc/self/ns/ipc", CloneFlags::CLONE_NEWIPC, IPC),
    ("/proc/self/ns/uts", CloneFlags::CLONE_NEWUTS, UTS),
];

fn open(path: &str) -> Result<File, NamespaceError> {
    File::open(path).map_err(|source| NamespaceError::Open { path: path.to_owned(), source })
}

fn kernel(action: &'static str) -> impl Fn(nix::Error) -> NamespaceError {
    move |source| NamespaceError::Kernel { action, source }
}

/// Puts the agent back where it was, whatever happened in between.
struct Home(Vec<(File, CloneFlags)>);

impl Home {
    fn remember() -> Result<Self, NamespaceError> {
        KINDS.iter().map(|(own, flag, _)| Ok((open(own)?, *flag))).collect::<Result<_, _>>().map(Self)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for (file, flag) in &self.0 {
            if let Err(error) = setns(file.as_fd(), *flag) {
                crate::boot::fatal::die(&format!("cannot return to the agent's own namespaces: {error}"));
            }
        }
    }
}

/// Makes the pod's network, IPC and UTS namespaces.
///
/// # Errors
/// [`NamespaceError`].
pub fn make() -> Result<(), NamespaceError> {
    let directory = "/run/husk/ns";
    fs::create_dir_all(directory).map_err(|source| NamespaceError::Open { path: directory.into(), source })?;
    let home = Home::remember()?;
    unshare(KINDS.iter().fold(CloneFlags::empty(), |all, kind| all | kind.1)).map_err(kernel("make"))?;
    for (own, _, pin) in KINDS {
        pin_at(own, pin)?;
    }
    if let Err(error) = link::loopback_up() {
        tracing::warn!("cannot bring the pod's lo up: {error}");
    }
    drop(home);
    Ok(())
}

fn pin_at(namespace: &str, pin: &str) -> Result<(), NamespaceError> {
    File::create(pin).map_err(|source| NamespaceError::Open { path: pin.to_owned(), source })?;
    mount(Some(namespace), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(kernel("pin"))
}

/// Runs `f` in the pod's namespaces. It must not wait for anything.
///
/// # Errors
/// [`NamespaceError`] when they cannot be entered.
pub fn within<T>(f: impl FnOnce() -> T) -> Result<T, NamespaceError> {
    let home = Home::remember()?;
    for (_, flag, pin) in KINDS {
        setns(open(pin)?.as_fd(), *flag).map_err(kernel("enter"))?;
    }
    let result = f();
    drop(home);
    Ok(result)
}

/// Starts the process that holds a shared process namespace, and pins that at `pin`.
///
/// # Errors
/// What the kernel says.
pub fn make_shared_pid(pin: &Path) -> io::Result<()> {
    let own = File::open("/proc/self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = Command::new("/proc/self/exe")
        .arg0(crate::helper::ARGV0)
        .arg(crate::helper::REAPER)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    // SAFETY: setns takes a live descriptor and a number.
    if unsafe { libc::setns(own.as_raw_fd(), libc::CLONE_NEWPID) } != 0 {
        crate::boot::fatal::die("cannot return to the agent's own process namespace");
    }
    let path = format!("/proc/{}/ns/pid", child?.id());
    File::create(pin)?;
    mount(Some(path.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}
