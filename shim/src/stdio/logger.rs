//! `binary://` loggers: programs that read a container's output.
//!
//! containerd defines the protocol. The logger has CONTAINER_ID and CONTAINER_NAMESPACE in its environment. Fd 3 is the
//! container's stdout, and fd 4 is the container's stderr. Fd 5 is the write end of a pipe. When the logger is ready,
//! the logger writes to fd 5 or closes fd 5.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use husk_base::async_fd::register;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::Signal,
    unistd::pipe2,
};
use tokio::{io::Interest, sync::oneshot, time::timeout};

use super::{LoggerContext, StdioError};
use crate::launcher::{LaunchError, Program, ProgramOptions};

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
    let program = spawn(path, args, context, &ends).await.map_err(system("failed to spawn the process"))?;
    drop(ends);
    let (released, release) = oneshot::channel();
    tokio::spawn(supervise(path.to_path_buf(), program, release));
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

async fn spawn(path: &Path, args: &[String], context: &LoggerContext<'_>, ends: &[OwnedFd; 3]) -> io::Result<Program> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let [out, err, ready] = ends.each_ref().map(AsFd::as_fd);
    let options = ProgramOptions {
        path,
        arg0: None,
        args,
        env: Some(vec![("CONTAINER_ID", context.id), ("CONTAINER_NAMESPACE", context.namespace)]),
        cwd: None,
        fds: &[null.as_fd(), null.as_fd(), null.as_fd(), out, err, ready],
        cgroup: None,
        kill_on_drop: false,
    };
    context.launcher.start_program(&options).await.map_err(|error| match error {
        LaunchError::Execute(source) => source,
        other => io::Error::other(other),
    })
}

/// Waits until the logger exits, and reaps the logger. If the logger does not exit within `EXIT_TIMEOUT` after the
/// handle is dropped, sends SIGTERM. If the logger then does not exit within `SIGTERM_TIMEOUT`, sends SIGKILL.
async fn supervise(path: PathBuf, program: Program, release: oneshot::Receiver<()>) {
    tokio::select! {
        () = program.ended() => {}
        _ = release => {
            if timeout(EXIT_TIMEOUT, program.ended()).await.is_err() {
                program.signal(Signal::SIGTERM);
                if timeout(SIGTERM_TIMEOUT, program.ended()).await.is_err() {
                    program.signal(Signal::SIGKILL);
                }
            }
        }
    }
    if let Ok(status) = program.wait().await
        && !status.success()
    {
        tracing::warn!("the logger {} failed: {status}", path.display());
    }
}
