//! The launcher starts programs for the shim: hooks, loggers, containerd's publish command, and some VMM processes.
//!
//! The launcher is a process that the shim forks before the shim confines itself ([`crate::confinement`]). Therefore,
//! programs have the rights, the mounts and the cgroup that they would have under runc. The shim itself cannot execute
//! programs.
//!
//! A started program is a child of the shim. The launcher ends when the shim closes its end of the socket.

mod process;
mod program;
mod request;

use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use husk_base::sys::fd::set_nonblocking;
use husk_base::sys::scm_rights;
use husk_vmm::client::Spawned;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::ForkResult;
use tokio::io::Interest;

use crate::async_fd::register;
use request::{Reply, Request};

pub use program::Program;

/// Timeout for the start of a program. Reading the program can block, for example on a network file system.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A failure to start a program.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher cannot be started.
    #[error("failed to start the launcher")]
    Fork(#[source] io::Error),
    /// The request cannot be sent.
    #[error("failed to send a request to the launcher: the launcher may have ended")]
    Send(#[source] io::Error),
    /// There is no valid answer.
    #[error("failed to receive the launcher's answer: the launcher may have ended")]
    Receive(#[source] io::Error),
    /// The program cannot be executed.
    #[error("failed to execute the program")]
    Execute(#[source] io::Error),
    /// The VMM cannot be started. The text contains the causes.
    #[error("failed to start the VMM process: {0}")]
    Vmm(String),
    /// The start takes too long.
    #[error("the program did not start within {} s", START_TIMEOUT.as_secs())]
    Timeout,
}

/// How to start a program.
#[derive(Debug)]
pub struct ProgramOptions<'a> {
    /// Path of the program.
    pub path: &'a std::path::Path,
    /// `argv[0]`. `None` means the path.
    pub arg0: Option<&'a str>,
    /// The arguments after `argv[0]`.
    pub args: &'a [String],
    /// The environment. `None` means the launcher's environment.
    pub env: Option<Vec<(&'a str, &'a str)>>,
    /// The program's fds 0, 1, 2 and so on.
    pub fds: &'a [BorrowedFd<'a>],
    /// Whether the program gets SIGKILL when its [`Program`] is dropped before the program has ended.
    pub kill_on_drop: bool,
}

/// A handle to the launcher. When the last handle is dropped, the launcher ends.
#[derive(Debug, Clone)]
pub struct Launcher {
    socket: Arc<OwnedFd>,
}

impl Launcher {
    /// Forks the launcher. The shim must have a single thread.
    ///
    /// # Errors
    /// [`LaunchError::Fork`].
    pub fn start() -> Result<Self, LaunchError> {
        let error = |errno: nix::Error| LaunchError::Fork(errno.into());
        let (socket, launcher_end) = pair().map_err(LaunchError::Fork)?;
        // A write to a full blocking socket would block the async runtime.
        set_nonblocking(&socket).map_err(LaunchError::Fork)?;
        // SAFETY: this process has a single thread. Therefore, the child is not limited to async-signal-safe functions.
        match unsafe { nix::unistd::fork() }.map_err(error)? {
            ForkResult::Child => process::run(&launcher_end),
            ForkResult::Parent { .. } => Ok(Self { socket: Arc::new(socket) }),
        }
    }

    /// Starts a program, and waits until execve(2) has succeeded.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn start_program(&self, options: &ProgramOptions<'_>) -> Result<Program, LaunchError> {
        let reply = self.send(&Request::from(options), options.fds)?;
        set_nonblocking(&reply).map_err(LaunchError::Receive)?;
        let reply = register(reply, Interest::READABLE).map_err(LaunchError::Receive)?;
        let start = async {
            let receive = async || loop {
                let mut guard = reply.readable().await.map_err(LaunchError::Receive)?;
                if let Ok(result) = guard.try_io(|socket| Reply::receive(socket.get_ref())) {
                    return result.map_err(LaunchError::Receive);
                }
            };
            let program = match receive().await? {
                Some(Reply::Started { pid, fds }) => Program::new(pid, fds, options.kill_on_drop)?,
                Some(Reply::Failed(source)) => return Err(LaunchError::Execute(source)),
                Some(Reply::Error(_)) | None => return Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
            };
            match receive().await? {
                // execve(2) has succeeded, and has closed the new process's copy of the socket.
                None => Ok(program),
                Some(Reply::Failed(source)) => Err(LaunchError::Execute(source)),
                Some(_) => Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
            }
        };
        tokio::time::timeout(START_TIMEOUT, start).await.map_err(|_| LaunchError::Timeout)?
    }

    /// Starts the VMM process in a mount namespace, a network namespace and cgroups. `cgroups` are the open files
    /// `cgroup.procs` of these cgroups. Blocks the calling thread until the launcher answers.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn start_vmm(
        &self,
        mounts: BorrowedFd<'_>,
        network: BorrowedFd<'_>,
        cgroups: &[OwnedFd],
    ) -> Result<Spawned, LaunchError> {
        let fds: Vec<_> = [mounts, network].into_iter().chain(cgroups.iter().map(AsFd::as_fd)).collect();
        let reply = self.send(&Request::Vmm, &fds)?;
        match Reply::receive(&reply).map_err(LaunchError::Receive)? {
            Some(Reply::Started { pid, fds }) => match <[OwnedFd; 2]>::try_from(fds) {
                Ok([pidfd, control]) => Ok(Spawned { pid: pid.cast_unsigned(), pidfd, control }),
                Err(_) => Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
            },
            Some(Reply::Error(text)) => Err(LaunchError::Vmm(text)),
            _ => Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Sends a request. Returns the socket on which the answers arrive.
    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<OwnedFd, LaunchError> {
        let send = || -> io::Result<_> {
            // The request is in a file, because a hook can have more arguments than fit into a packet.
            let mut file = std::fs::File::from(memfd_create("launch", MFdFlags::MFD_CLOEXEC)?);
            file.write_all(&serde_json::to_vec(request)?)?;
            file.rewind()?;
            let (reply, launcher_end) = pair()?;
            let fds: Vec<_> = [file.as_fd(), launcher_end.as_fd()].into_iter().chain(fds.iter().copied()).collect();
            scm_rights::send(self.socket.as_fd(), b"r", &fds)?;
            Ok(reply)
        };
        send().map_err(LaunchError::Send)
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Returns the launcher that the unit tests of this crate share.
#[cfg(test)]
pub fn of_tests() -> &'static Launcher {
    static LAUNCHER: std::sync::LazyLock<Launcher> = std::sync::LazyLock::new(|| Launcher::start().unwrap());
    &LAUNCHER
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::path::Path;

    use super::*;

    async fn start(script: &str, fds: &[BorrowedFd<'_>], kill_on_drop: bool) -> Result<Program, LaunchError> {
        let args = ["-c".to_owned(), script.to_owned()];
        let env = Some(vec![("NAME", "value")]);
        let path = Path::new("/bin/sh");
        let options = ProgramOptions { path, arg0: Some("name"), args: &args, env, fds, kill_on_drop };
        of_tests().start_program(&options).await
    }

    #[tokio::test]
    async fn program_has_the_given_options_and_is_a_child_of_the_shim() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let script = "echo $0 $NAME $PPID >&3; ls /proc/self/fd | wc -l >&3; exit 5";
        let fds = [null.as_fd(), null.as_fd(), null.as_fd(), writer.as_fd()];
        let program = start(&format!("PATH=/usr/bin:/bin; {script}"), &fds, true).await.unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        // The program has the four given fds, and ls also opens the directory.
        assert_eq!(text, format!("name value {}\n5\n", std::process::id()));
        assert_eq!(program.wait().await.unwrap().code(), Some(5));
    }

    #[tokio::test]
    async fn program_that_cannot_be_executed_is_an_error() {
        let options = ProgramOptions {
            path: Path::new("/nowhere/x"),
            arg0: None,
            args: &[],
            env: None,
            fds: &[],
            kill_on_drop: true,
        };
        let error = of_tests().start_program(&options).await.unwrap_err();
        assert!(matches!(&error, LaunchError::Execute(e) if e.kind() == io::ErrorKind::NotFound), "{error:?}");
    }

    #[tokio::test]
    async fn dropped_program_is_killed_if_the_options_say_so() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let fds = [null.as_fd(), null.as_fd(), null.as_fd(), writer.as_fd()];
        let program = start("echo >&3; while :; do /bin/sleep 1000; done", &fds, true).await.unwrap();
        drop(writer);
        reader.read_exact(&mut [0]).unwrap();
        let pid = program.pid();
        drop(program);
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The test does not wait for EOF, because `sleep`, a child of the killed shell, still holds the pipe.
        drop(reader);
    }
}
