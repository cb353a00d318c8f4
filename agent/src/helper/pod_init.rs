//! PID 1 of a PID namespace that several containers share.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use husk_base::error::chain;
use husk_base::sys::capabilities::{self, Capabilities};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};

/// What PID 1 writes to its standard output once it is confined. If the confinement fails, PID 1 writes the error
/// instead.
pub const CONFINED: &str = "confined";
/// Mount point of PID 1's root directory until PID 1 has changed to this root. The agent makes this directory at boot.
const ROOT: &str = "/run/husk";

/// Reason why PID 1 cannot be confined.
#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error("failed to enter the namespace {}", .0.display())]
    Namespace(OsString, #[source] io::Error),
    #[error("failed to change to an empty root directory")]
    Root(#[source] nix::Error),
    #[error("failed to drop all capabilities")]
    Capabilities(#[source] io::Error),
    #[error("failed to set no_new_privs")]
    NoNewPrivs(#[source] nix::Error),
}

/// Runs PID 1 of a shared PID namespace. Its only task is to reap orphans. `namespaces` are the paths of namespaces
/// that the process enters.
///
/// Every container of the pod sees this process. With CAP_SYS_PTRACE, a container can trace it, and open
/// `/proc/1/root`. Therefore, this process gives such a container no further access. Its root directory is empty, it is
/// in the pod's namespaces, and it has no capability.
pub fn run(namespaces: impl Iterator<Item = OsString>) -> ExitCode {
    let confined = confine(namespaces);
    let text = match &confined {
        Ok(()) => CONFINED.to_owned(),
        Err(error) => chain(error),
    };
    let reported = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    // Replace the pipe by /dev/null, because the agent reads until the pipe is closed.
    let closed = nix::unistd::dup2_stdout(io::stdin());
    match (confined, reported, closed) {
        (Ok(()), Ok(()), Ok(())) => super::reap_forever(),
        _ => ExitCode::FAILURE,
    }
}

fn confine(namespaces: impl Iterator<Item = OsString>) -> Result<(), ConfineError> {
    for path in namespaces {
        let entered = File::open(&path).and_then(|namespace| Ok(setns(namespace.as_fd(), CloneFlags::empty())?));
        entered.map_err(|source| ConfineError::Namespace(path, source))?;
    }
    change_root().map_err(ConfineError::Root)?;
    drop_capabilities().map_err(ConfineError::Capabilities)?;
    nix::sys::prctl::set_no_new_privs().map_err(ConfineError::NoNewPrivs)
}

/// Changes to an empty, read-only root directory in a new mount namespace. After pivot_root(2), `/proc/1/root/..` is
/// the same directory. After chroot(2), it would be a directory of the guest.
fn change_root() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), ROOT, Some("tmpfs"), flags, Some("mode=0555,size=4k,nr_inodes=2"))?;
    chdir(ROOT)?;
    // pivot_root(2), "pivot_root(".", ".")": the old root is then mounted on the new root.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

fn drop_capabilities() -> io::Result<()> {
    for number in 0..capabilities::count()? {
        capabilities::drop_from_bounding_set(number)?;
    }
    // The kernel removes a capability from the ambient set when it leaves the permitted set (capabilities(7)).
    capabilities::set(Capabilities::default())
}
