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

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use husk_base::async_fd::register;
use husk_base::sys::fd::set_nonblocking;
use husk_base::sys::scm_rights;
use husk_vmm::client::Spawned;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::ForkResult;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

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
    /// The request cannot be created.
    #[error("failed to create a request to the launcher")]
    Prepare(#[source] io::Error),
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

/// The open files of a cgroup in which a new process starts.
#[derive(Debug)]
pub enum StartCgroup {
    /// The directory, for CLONE_INTO_CGROUP.
    V2(OwnedFd),
    /// The files `cgroup.procs` of the hierarchies.
    V1(Vec<OwnedFd>),
}

impl StartCgroup {
    /// Returns the open files.
    fn files(&self) -> &[OwnedFd] {
        match self {
            Self::V2(directory) => std::slice::from_ref(directory),
            Self::V1(procs) => procs,
        }
    }
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
    /// The working directory. `None` means the launcher's directory: the bundle of the sandbox.
    pub cwd: Option<&'a std::path::Path>,
    /// The program's fds 0, 1, 2 and so on.
    pub fds: &'a [BorrowedFd<'a>],
    /// The cgroup in which the program starts. `None` means the launcher's cgroup.
    pub cgroup: Option<&'a StartCgroup>,
    /// Whether the program gets SIGKILL when its [`Program`] is dropped before the program has ended.
    pub kill_on_drop: bool,
}

/// A handle to the launcher. When the last handle is dropped, the launcher ends.
#[derive(Debug, Clone)]
pub struct Launcher {
    socket: Arc<OwnedFd>,
}

impl Launcher {
    /// Forks the launcher. The shim must have a single thread. The launcher ends when this thread ends, at the latest.
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

    /// Returns a launcher that has ended.
    #[cfg(test)]
    pub fn ended() -> Self {
        let (socket, _) = pair().unwrap();
        Self { socket: Arc::new(socket) }
    }

    /// Waits until the launcher has ended.
    ///
    /// # Errors
    /// If the socket cannot be registered with the async runtime.
    pub async fn wait_end(&self) -> io::Result<()> {
        // The launcher sends nothing on this socket. Therefore the socket becomes readable only when the launcher ends.
        register(self.socket.try_clone()?, Interest::READABLE)?.readable().await.map(drop)
    }

    /// Starts a program, and waits until execve(2) has succeeded. If the caller stops waiting, a program that starts
    /// later is killed.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn start_program(&self, options: &ProgramOptions<'_>) -> Result<Program, LaunchError> {
        let start = async {
            let cgroup = options.cgroup.map_or(&[][..], StartCgroup::files);
            let fds: Vec<_> = options.fds.iter().copied().chain(cgroup.iter().map(AsFd::as_fd)).collect();
            let reply = self.send_when_writable(&Request::from(options), &fds).await?;
            set_nonblocking(&reply).map_err(LaunchError::Receive)?;
            let reply = register(reply, Interest::READABLE).map_err(LaunchError::Receive)?;
            let (done, started) = oneshot::channel();
            // The caller can drop this future at any time. The task still runs to its end. If nobody takes the program,
            // the program is killed and reaped.
            tokio::spawn(async move { drop(done.send(receive_program(&reply).await)) });
            let started = started.await.unwrap_or_else(|_| Err(LaunchError::Receive(io::ErrorKind::BrokenPipe.into())));
            started.map(|program| program.with_kill_on_drop(options.kill_on_drop))
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
        let (file, reply, launcher_end) = prepare(&Request::Vmm)?;
        self.send(&file, &launcher_end, &fds).map_err(LaunchError::Send)?;
        drop(launcher_end);
        // The new process can block before it executes the VMM, for example if its cgroup is frozen. A VMM that starts
        // after the timeout ends at once, because the other end of its control socket is closed.
        let limit = PollTimeout::try_from(START_TIMEOUT).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut [PollFd::new(reply.as_fd(), PollFlags::POLLIN)], limit) {
                Ok(0) => return Err(LaunchError::Timeout),
                Ok(_) => break,
                // This thread has handled a signal, for example SIGTERM.
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(LaunchError::Receive(errno.into())),
            }
        }
        match Reply::receive(&reply).map_err(LaunchError::Receive)? {
            Some(Reply::Started { pid, fds }) => match <[OwnedFd; 2]>::try_from(fds) {
                Ok([pidfd, control]) => Ok(Spawned { pid: pid.cast_unsigned(), pidfd, control }),
                Err(_) => {
                    program::kill_and_reap(pid);
                    Err(LaunchError::Receive(nix::Error::EMFILE.into()))
                }
            },
            Some(Reply::Error(text)) => Err(LaunchError::Vmm(text)),
            _ => Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Sends a request when the socket has room for the request. Returns the socket on which the answers arrive.
    async fn send_when_writable(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<OwnedFd, LaunchError> {
        let (file, reply, launcher_end) = prepare(request)?;
        let socket = self.socket.try_clone().and_then(|socket| register(socket, Interest::WRITABLE));
        let socket = socket.map_err(LaunchError::Prepare)?;
        let sent = socket.async_io(Interest::WRITABLE, |_| self.send(&file, &launcher_end, fds)).await;
        sent.map_err(LaunchError::Send)?;
        Ok(reply)
    }

    fn send(&self, file: &File, launcher_end: &OwnedFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<_> = [file.as_fd(), launcher_end.as_fd()].into_iter().chain(fds.iter().copied()).collect();
        scm_rights::send(self.socket.as_fd(), b"r", &fds).map(drop)
    }
}

/// Creates a file that contains the request, and a socket pair: the shim's end, on which the answers arrive, and the
/// launcher's end.
fn prepare(request: &Request) -> Result<(File, OwnedFd, OwnedFd), LaunchError> {
    let create = || -> io::Result<_> {
        // A file has no maximum size, unlike a packet. A hook can have many arguments.
        let mut file = File::from(memfd_create("launch", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&serde_json::to_vec(request)?)?;
        file.rewind()?;
        let (reply, launcher_end) = pair()?;
        Ok((file, reply, launcher_end))
    };
    create().map_err(LaunchError::Prepare)
}

/// Receives answers until the program is executed, or until it has failed. The launcher and the new process send their
/// answers on the same socket, in any order. execve closes the last copy of the launcher's end of the socket.
async fn receive_program(reply: &AsyncFd<OwnedFd>) -> Result<Program, LaunchError> {
    let (mut program, mut failure) = (None, None);
    loop {
        let received = reply.async_io(Interest::READABLE, Reply::receive).await;
        match received.map_err(LaunchError::Receive)? {
            Some(Reply::Started { pid, fds }) => program = Some(Program::new(pid, fds)?),
            Some(Reply::Failed(source)) => failure = Some(LaunchError::Execute(source)),
            Some(Reply::Error(_)) => return Err(LaunchError::Receive(io::ErrorKind::InvalidData.into())),
            None => break,
        }
    }
    match failure {
        Some(failure) => Err(failure),
        None => program.ok_or_else(|| LaunchError::Receive(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Returns the launcher that the unit tests of this crate share.
#[cfg(test)]
pub fn of_tests() -> &'static Launcher {
    static LAUNCHER: std::sync::LazyLock<Launcher> = std::sync::LazyLock::new(|| {
        let (launcher, started) = std::sync::mpsc::channel();
        // The launcher ends with the thread that has started it.
        std::thread::spawn(move || {
            launcher.send(Launcher::start().unwrap()).unwrap();
            loop {
                std::thread::park();
            }
        });
        started.recv().unwrap()
    });
    &LAUNCHER
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::path::Path;

    use super::*;

    async fn start(script: &str, fds: &[BorrowedFd<'_>], kill_on_drop: bool) -> Result<Program, LaunchError> {
        let args = ["-c".to_owned(), script.to_owned()];
        let env = Some(vec![("NAME", "value")]);
        let path = Path::new("/bin/sh");
        let options = ProgramOptions {
            path,
            arg0: Some("name"),
            args: &args,
            env,
            cwd: Some(Path::new("/usr")),
            fds,
            cgroup: None,
            kill_on_drop,
        };
        of_tests().start_program(&options).await
    }

    #[tokio::test]
    async fn program_has_the_given_options_and_is_a_child_of_the_shim() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let script = "echo $0 $NAME $PPID $PWD >&3; ls /proc/self/fd | wc -l >&3; exit 5";
        let fds = [null.as_fd(), null.as_fd(), null.as_fd(), writer.as_fd()];
        let program = start(&format!("PATH=/usr/bin:/bin; {script}"), &fds, true).await.unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        // The program has the four given fds, and ls also opens the directory.
        assert_eq!(text, format!("name value {} /usr\n5\n", std::process::id()));
        assert_eq!(program.wait().await.unwrap().code(), Some(5));
    }

    /// Returns the PIDs of this process's launchers.
    fn launchers() -> Vec<i32> {
        let own = format!("\nPPid:\t{}\n", std::process::id());
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        let is_launcher = |pid: &i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.starts_with("Name:\thusk-launcher\n") && status.contains(&own)
        };
        pids.filter_map(|pid| pid.parse().ok()).filter(is_launcher).collect()
    }

    #[tokio::test]
    async fn launcher_goes_on_after_sigterm_and_its_programs_block_no_signal() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let fds = [null.as_fd(), null.as_fd(), null.as_fd(), writer.as_fd()];
        drop(start("exit 0", &fds, true).await.unwrap());
        let launchers = launchers();
        assert!(!launchers.is_empty());
        for pid in launchers {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
        }
        // A shell would clear the mask itself.
        let options = ProgramOptions {
            path: Path::new("/usr/bin/grep"),
            arg0: None,
            args: &["SigBlk".to_owned(), "/proc/self/status".to_owned()],
            env: None,
            cwd: None,
            fds: &[null.as_fd(), writer.as_fd()],
            cgroup: None,
            kill_on_drop: true,
        };
        let program = of_tests().start_program(&options).await.unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "SigBlk:\t0000000000000000\n");
        program.wait().await.unwrap();
    }

    /// Starts a program in a cgroup. The program writes its fds to a pipe. Returns this text.
    async fn start_in(cgroup: &StartCgroup) -> Result<String, LaunchError> {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let options = ProgramOptions {
            path: Path::new("/bin/ls"),
            arg0: None,
            args: &["/proc/self/fd".to_owned()],
            env: None,
            cwd: None,
            fds: &[null.as_fd(), writer.as_fd()],
            cgroup: Some(cgroup),
            kill_on_drop: true,
        };
        let program = of_tests().start_program(&options).await?;
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        program.wait().await.unwrap();
        Ok(text)
    }

    #[tokio::test]
    async fn program_starts_in_its_cgroup_and_does_not_get_the_files_of_the_cgroup() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["cpu", "memory"].map(|name| dir.path().join(name));
        let procs = paths.iter().map(|path| File::create(path).unwrap().into()).collect();
        let fds = start_in(&StartCgroup::V1(procs)).await.unwrap();
        for path in &paths {
            assert_eq!(std::fs::read_to_string(path).unwrap(), "0");
        }
        // The last fd is that of the directory.
        assert_eq!(fds, "0\n1\n2\n3\n");
        // The kernel refuses to clone into a directory that is not a cgroup v2.
        let directory = StartCgroup::V2(File::open(dir.path()).unwrap().into());
        let error = start_in(&directory).await.unwrap_err();
        assert!(matches!(&error, LaunchError::Execute(e) if e.raw_os_error() == Some(libc::EBADF)), "{error:?}");
        // A program does not run outside of its cgroup.
        let closed = StartCgroup::V1(vec![File::open("/dev/null").unwrap().into()]);
        start_in(&closed).await.unwrap_err();
    }

    #[tokio::test]
    async fn program_that_cannot_be_executed_is_an_error() {
        let options = ProgramOptions {
            path: Path::new("/nowhere/x"),
            arg0: None,
            args: &[],
            env: None,
            cwd: None,
            fds: &[],
            cgroup: None,
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
