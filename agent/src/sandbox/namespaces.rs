//! Makes the pod's namespaces, pins them by bind mounts and runs code in them.
//!
//! The agent has one thread, and nothing here waits: entering and leaving is invisible to everything else.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::users::IdMappings;
use super::{IPC, NET, USER, UTS, link};

/// Why namespaces could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A file of a namespace could not be opened or made.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: String,
        #[source]
        source: io::Error,
    },
    /// A namespace could not be made, entered or pinned.
    #[error("cannot {action} namespaces")]
    Kernel {
        /// What was being done.
        action: &'static str,
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

/// Makes the pod's network, IPC and UTS namespaces, and with `id_mappings` the user namespace that owns them.
pub fn make(id_mappings: Option<&IdMappings>) -> Result<(), NamespaceError> {
    let directory = "/run/husk/ns";
    fs::create_dir_all(directory).map_err(|source| NamespaceError::Open { path: directory.into(), source })?;
    if let Some(id_mappings) = id_mappings {
        make_owned(id_mappings)?;
        if let Err(error) = within(link::loopback_up)? {
            tracing::warn!("cannot bring the pod's lo up: {error}");
        }
        return Ok(());
    }
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

/// The same by a process that stays in them until they are pinned: whoever has entered a user namespace is no longer
/// root outside of it, and the agent has to be.
fn make_owned(id_mappings: &IdMappings) -> Result<(), NamespaceError> {
    let open = |path: String| move |source| NamespaceError::Open { path, source };
    let all = KINDS.iter().fold(CloneFlags::CLONE_NEWUSER, |all, kind| all | kind.1);
    let mut holder = holder(move || unshare(all)).map_err(open("/proc/self/exe".into()))?;
    let made = (|| {
        let proc = format!("/proc/{}", holder.id());
        for (name, text) in [("uid_map", id_mappings.uid_map()), ("gid_map", id_mappings.gid_map())] {
            let path = format!("{proc}/{name}");
            fs::write(&path, text).map_err(open(path))?;
        }
        pin_at(&format!("{proc}/ns/user"), USER)?;
        KINDS.iter().try_for_each(|(own, _, pin)| pin_at(&own.replace("/proc/self", &proc), pin))
    })();
    // The reaper collects it.
    if let Err(error) = holder.kill() {
        tracing::warn!("namespace holder: {error}");
    }
    made
}

/// Starts a process that does nothing, after `enter` in it; it has happened when this returns.
fn holder(enter: impl FnMut() -> nix::Result<()> + Send + Sync + 'static) -> io::Result<Child> {
    let mut enter = enter;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(crate::helper::ARGV0).arg(crate::helper::REAPER).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: what is given does system calls only, which take no lock of another thread's.
    unsafe { command.pre_exec(move || Ok(enter()?)) };
    command.spawn()
}

fn pin_at(namespace: &str, pin: &str) -> Result<(), NamespaceError> {
    match umount2(pin, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Nothing was pinned here before.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => return Err(kernel("replace")(error)),
    }
    File::create(pin).map_err(|source| NamespaceError::Open { path: pin.to_owned(), source })?;
    mount(Some(namespace), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(kernel("pin"))
}

/// Runs `f` in the pod's namespaces. It must not wait for anything.
pub fn within<T>(f: impl FnOnce() -> T) -> Result<T, NamespaceError> {
    let home = Home::remember()?;
    for (_, flag, pin) in KINDS {
        setns(open(pin)?.as_fd(), *flag).map_err(kernel("enter"))?;
    }
    let result = f();
    drop(home);
    Ok(result)
}

/// Starts the process that holds a shared process namespace, and pins that at `pin`; with `id_mappings` it belongs to that
/// user namespace.
pub fn make_shared_pid(pin: &Path, id_mappings: Option<&Path>) -> io::Result<()> {
    if let Some(id_mappings) = id_mappings {
        return make_owned_pid(pin, id_mappings);
    }
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

/// The same in a user namespace. A process namespace is entered by the next child only, so there is a process between,
/// which tells its child's id and ends.
fn make_owned_pid(pin: &Path, id_mappings: &Path) -> io::Result<()> {
    let id_mappings = File::open(id_mappings)?;
    let (mut told, teller) = io::pipe()?;
    holder(move || {
        setns(id_mappings.as_fd(), CloneFlags::CLONE_NEWUSER)?;
        unshare(CloneFlags::CLONE_NEWPID)?;
        // SAFETY: this process has one thread, being between fork and exec already.
        match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Child => Ok(()),
            nix::unistd::ForkResult::Parent { child } => {
                let told = nix::unistd::write(&teller, &child.as_raw().to_ne_bytes());
                // SAFETY: this ends the process and runs nothing of it.
                unsafe { libc::_exit(i32::from(told.is_err())) }
            }
        }
    })?;
    let mut pid = [0; 4];
    io::Read::read_exact(&mut told, &mut pid)?;
    File::create(pin)?;
    let path = format!("/proc/{}/ns/pid", i32::from_ne_bytes(pid));
    mount(Some(path.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}
