//! `binary://` loggers: a program that reads the container's output.
//!
//! containerd's protocol: CONTAINER_ID and CONTAINER_NAMESPACE in the environment, descriptor 3 is standard output, 4
//! standard error, and 5 is a pipe that the logger closes (or writes to) once it is ready.

use super::{Owner, StdioError, copy::register};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe2},
};
use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
    time::timeout,
};

/// How long a logger may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to write what it has once its input has ended.
const FLUSH: Duration = Duration::from_secs(10);
/// How long it may take to end when told to.
const TERM: Duration = Duration::from_secs(2);

/// Holds on to a logger: when it is dropped, the logger has a while to end and is then made to.
#[derive(Debug)]
pub struct Minder {
    _released: oneshot::Sender<()>,
}

/// Starts a logger and waits until it is ready; the write ends of its standard output and error pipes.
pub async fn start(path: &Path, args: &[String], owner: &Owner<'_>) -> Result<(OwnedFd, OwnedFd, Minder), StdioError> {
    let fail = |message: &str, source| StdioError::Logger { path: path.into(), message: message.into(), source };
    let system = |message: &'static str| move |source: io::Error| fail(message, Some(source));
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|error| system("cannot make a pipe")(error.into()));
    let (out_read, out_write) = pipe()?;
    let (err_read, err_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    for end in [&out_write, &err_write, &ready_read] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| system("cannot set up a pipe")(e.into()))?;
    }
    let ends = [out_read, err_read, ready_write];
    let child = spawn(path, args, owner, &ends).map_err(system("cannot be started"))?;
    drop(ends);
    let pidfd = pidfd(&child).map_err(system("cannot be watched"))?;
    let (released, release) = oneshot::channel();
    tokio::spawn(mind(path.to_path_buf(), child, pidfd, release));
    let minder = Minder { _released: released };
    let ready = register(ready_read, Interest::READABLE).map_err(StdioError::Register)?;
    let wait = async {
        loop {
            let mut guard = ready.readable().await?;
            let read = |fd: BorrowedFd<'_>| Ok(nix::unistd::read(fd, &mut [0])?);
            // A byte or the end: containerd takes both for readiness.
            if let Ok(result) = guard.try_io(|fd| read(fd.as_fd())) {
                return result;
            }
        }
    };
    match timeout(READY, wait).await {
        Ok(Ok(_)) => Ok((out_write, err_write, minder)),
        Ok(Err(source)) => Err(fail("cannot be waited for", Some(source))),
        Err(_) => Err(fail(&format!("was not ready after {} s", READY.as_secs()), None)),
    }
}

fn spawn(path: &Path, args: &[String], owner: &Owner<'_>, ends: &[OwnedFd; 3]) -> io::Result<Child> {
    // Copies far from 3 to 5, so that putting one there cannot overwrite another.
    let copy = |fd: &OwnedFd| -> io::Result<OwnedFd> {
        let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(16))?;
        // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(copy) })
    };
    let [out, err, ready] = ends;
    let copies = [copy(out)?, copy(err)?, copy(ready)?];
    let mut command = Command::new(path);
    command
        .args(args)
        .env_clear()
        .env("CONTAINER_ID", owner.id)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let numbers = copies.each_ref().map(AsRawFd::as_raw_fd);
    let place = move || {
        for (from, to) in numbers.iter().zip(3..) {
            // SAFETY: dup2 takes two numbers and is safe to call after fork; `from` is open until the exec.
            if unsafe { libc::dup2(*from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec `place` only calls dup2, and allocates nothing.
    unsafe { command.pre_exec(place) };
    command.spawn()
}

/// A descriptor that becomes readable when the child ends.
fn pidfd(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    // SAFETY: the call takes two numbers; the child is not reaped yet, so the pid is its.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    register(fd, Interest::READABLE)
}

/// Reaps the logger when it ends, and sees to it that it does once it is released.
async fn mind(path: PathBuf, mut child: Child, pidfd: AsyncFd<OwnedFd>, release: oneshot::Receiver<()>) {
    let gone = async || {
        let _ = pidfd.readable().await;
    };
    tokio::select! {
        () = gone() => {}
        _ = release => {
            let signal = |signal| {
                if let Ok(pid) = i32::try_from(child.id()) {
                    let _ = kill(Pid::from_raw(pid), signal);
                }
            };
            if timeout(FLUSH, gone()).await.is_err() {
                signal(Signal::SIGTERM);
                if timeout(TERM, gone()).await.is_err() {
                    signal(Signal::SIGKILL);
                    gone().await;
                }
            }
        }
    }
    // It has ended: this does not wait.
    if let Ok(status) = child.wait()
        && !status.success()
    {
        tracing::warn!("logger {}: {status}", path.display());
    }
}
