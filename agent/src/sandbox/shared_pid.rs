//! Creates the PID namespace that the containers of a pod share.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{ChildStdout, Stdio};

use husk_base::sys::process::exit_immediately;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};

use super::{IPC_NAMESPACE, NET_NAMESPACE, UTS_NAMESPACE, namespaces};
use crate::helper::POD_INIT;
use crate::helper::pod_init::CONFINED;

/// Arguments of the namespace's PID 1.
const ARGS: [&str; 4] = [POD_INIT, NET_NAMESPACE, IPC_NAMESPACE, UTS_NAMESPACE];
/// Maximum size of an error that PID 1 reports, in bytes.
const MAX_ERROR: u64 = 4096;

/// Creates a shared PID namespace, starts its PID 1 and pins the namespace at `pin`. If `user_namespace` is given, that
/// user namespace owns the PID namespace. Blocks for a few milliseconds.
pub fn create(pin: &Path, user_namespace: Option<&Path>) -> io::Result<()> {
    let (pid, output) = match user_namespace {
        Some(user_namespace) => spawn_in(user_namespace)?,
        None => spawn()?,
    };
    wait_until_confined(output)?;
    File::create(pin)?;
    mount(Some(format!("/proc/{pid}/ns/pid").as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Starts PID 1 in a new PID namespace. Returns its PID and its standard output.
fn spawn() -> io::Result<(u32, Option<ChildStdout>)> {
    let current = File::open("/proc/self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = namespaces::spawn(&ARGS, Stdio::piped(), || Ok(()));
    if setns(current.as_fd(), CloneFlags::CLONE_NEWPID).is_err() {
        crate::fatal::die("failed to return to the agent's PID namespace");
    }
    let mut child = child?;
    Ok((child.id(), child.stdout.take()))
}

/// Starts PID 1 in a new PID namespace that the given user namespace owns. Returns its PID and its standard output.
///
/// unshare(2) puts only children into the new PID namespace. Therefore an intermediate process forks a child, which is
/// the namespace's PID 1. The intermediate process reports the child's PID and exits.
fn spawn_in(user_namespace: &Path) -> io::Result<(u32, Option<ChildStdout>)> {
    let user_namespace = File::open(user_namespace)?;
    let (mut pid_reader, pid_writer) = io::pipe()?;
    let mut intermediate = namespaces::spawn(&ARGS, Stdio::piped(), move || {
        setns(user_namespace.as_fd(), CloneFlags::CLONE_NEWUSER)?;
        // The agent's uid, the guest's root, is not mapped in the user namespace. With this uid, the process would lose
        // all capabilities at execve(2). A container that traces PID 1 could also write the guest's files.
        setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
        setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
        unshare(CloneFlags::CLONE_NEWPID)?;
        // SAFETY: this process is between fork and exec, so it has one thread.
        match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Child => Ok(()),
            nix::unistd::ForkResult::Parent { child } => {
                let written = nix::unistd::write(&pid_writer, &child.as_raw().to_ne_bytes());
                exit_immediately(i32::from(written.is_err()))
            }
        }
    })?;
    let mut pid = [0; 4];
    pid_reader.read_exact(&mut pid)?;
    Ok((u32::from_ne_bytes(pid), intermediate.stdout.take()))
}

/// Waits until PID 1, whose standard output is `output`, is confined.
///
/// # Errors
/// Fails if PID 1 could not confine itself.
fn wait_until_confined(output: Option<ChildStdout>) -> io::Result<()> {
    let mut text = String::new();
    if let Some(output) = output {
        output.take(MAX_ERROR).read_to_string(&mut text)?;
    }
    match text.as_str() {
        CONFINED => Ok(()),
        "" => Err(io::Error::other("PID 1 of the shared PID namespace ended")),
        error => Err(io::Error::other(format!("failed to confine PID 1 of the shared PID namespace: {error}"))),
    }
}
