//! `binary://` loggers: programs that read a container's output.
//!
//! containerd defines the protocol. The logger has CONTAINER_ID and CONTAINER_NAMESPACE in its environment. Fd 3 is the
//! container's stdout, and fd 4 is the container's stderr. Fd 5 is the write end of a pipe. When the logger is ready,
//! the logger writes to fd 5 or closes fd 5.

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

use husk_base::sys::pidfd;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe2},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
    time::timeout,
};

use super::{LoggerContext, StdioError};
use crate::async_fd::register;

/// Timeout for a logger to become ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a logger to exit after its handle is dropped. After this timeout, the shim sends SIGTERM.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a logger to exit after SIGTERM. After this timeout, the shim sends SIGKILL.
const SIGTERM_TIMEOUT: Duration = Duration::from_secs(2);

/// Handle to a running logger. `EXIT_TIMEOUT` begins when the handle is dropped.
#[derive(Debug)]
pub struct LoggerHandle {
    _released: oneshot::Sender<()>,
}

/// Starts a logger and waits until the logger is ready. Returns the write ends of the pipes for stdout and stderr, and
/// the logger's handle.
pub async fn start(
    path: &Path,
    args: &[String],
    context: &LoggerContext<'_>,
) -> Result<(OwnedFd, OwnedFd, LoggerHandle), StdioError> {
    let fail = |message: &str, source| StdioError::Logger { path: path.into(), message: message.into(), source };
    let system = |message: &'static str| move |source: io::Error| fail(message, Some(source));
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|error| system("failed to create a pipe")(error.into()));
    let (out_read, out_write) = pipe()?;
    let (err_read, err_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    for end in [&out_write, &err_write, &ready_read] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|e| system("failed to make a pipe non-blocking")(e.into()))?;
    }
    let ends = [out_read, err_read, ready_write];
    let child = spawn(path, args, context, &ends).map_err(system("failed to spawn the process"))?;
    drop(ends);
    let pidfd = pidfd(&child).map_err(system("failed to open a pidfd"))?;
    let (released, release) = oneshot::channel();
    tokio::spawn(supervise(path.to_path_buf(), child, pidfd, release));
    let handle = LoggerHandle { _released: released };
    let ready = register(ready_read, Interest::READABLE).map_err(StdioError::Register)?;
    let wait = async {
        loop {
            let mut guard = ready.readable().await?;
            let read = |fd: BorrowedFd<'_>| Ok(nix::unistd::read(fd, &mut [0])?);
            // In containerd's protocol, a byte or EOF on the pipe means that the logger is ready.
            if let Ok(result) = guard.try_io(|fd| read(fd.as_fd())) {
                return result;
            }
        }
    };
    match timeout(READY_TIMEOUT, wait).await {
        Ok(Ok(_)) => Ok((out_write, err_write, handle)),
        Ok(Err(source)) => Err(fail("failed to wait until the logger is ready", Some(source))),
        Err(_) => Err(fail(&format!("the logger was not ready after {} s", READY_TIMEOUT.as_secs()), None)),
    }
}

fn spawn(path: &Path, args: &[String], context: &LoggerContext<'_>, ends: &[OwnedFd; 3]) -> io::Result<Child> {
    // Duplicate the pipe ends to high fd numbers. Otherwise, dup2(2) to fd 3, 4 or 5 could close a pipe end that
    // already has this number.
    let copy = |fd: &OwnedFd| -> io::Result<OwnedFd> {
        let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(16))?;
        // SAFETY: the kernel has just created this fd, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(copy) })
    };
    let [out, err, ready] = ends;
    let copies = [copy(out)?, copy(err)?, copy(ready)?];
    let mut command = Command::new(path);
    command
        .args(args)
        .env_clear()
        .env("CONTAINER_ID", context.id)
        .env("CONTAINER_NAMESPACE", context.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let numbers = copies.each_ref().map(AsRawFd::as_raw_fd);
    let dup_fds = move || {
        for (from, to) in numbers.iter().zip(3..) {
            // SAFETY: dup2 takes two numbers and is async-signal-safe. `from` stays open until exec.
            if unsafe { libc::dup2(*from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `dup_fds` calls only dup2, which is async-signal-safe. `dup_fds` does not allocate
    // memory.
    unsafe { command.pre_exec(dup_fds) };
    command.spawn()
}

/// Opens a pidfd of the child. The pidfd becomes readable when the child exits.
fn pidfd(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    // The PID cannot belong to another process, because the child has not been reaped yet.
    register(pidfd::open(pid)?, Interest::READABLE)
}

/// Waits until the logger exits, and reaps the logger. If the logger does not exit within `EXIT_TIMEOUT` after the
/// handle is dropped, sends SIGTERM. If the logger then does not exit within `SIGTERM_TIMEOUT`, sends SIGKILL.
async fn supervise(path: PathBuf, mut child: Child, pidfd: AsyncFd<OwnedFd>, release: oneshot::Receiver<()>) {
    let ended = async || {
        let _ = pidfd.readable().await;
    };
    tokio::select! {
        () = ended() => {}
        _ = release => {
            let signal = |signal| {
                if let Ok(pid) = i32::try_from(child.id()) {
                    let _ = kill(Pid::from_raw(pid), signal);
                }
            };
            if timeout(EXIT_TIMEOUT, ended()).await.is_err() {
                signal(Signal::SIGTERM);
                if timeout(SIGTERM_TIMEOUT, ended()).await.is_err() {
                    signal(Signal::SIGKILL);
                    ended().await;
                }
            }
        }
    }
    // This call does not block, because the logger has exited.
    if let Ok(status) = child.wait()
        && !status.success()
    {
        tracing::warn!("the logger {} failed: {status}", path.display());
    }
}
