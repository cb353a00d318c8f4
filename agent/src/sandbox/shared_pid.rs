//! Creates the PID namespace that the containers of a pod share.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{ChildStdout, Stdio};
use std::time::Duration;

use husk_base::async_fd;
use husk_base::sys::fd::set_nonblocking;
use husk_base::sys::pidfd;
use husk_base::sys::process::exit_immediately;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use tokio::io::Interest;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{IPC_NAMESPACE, NET_NAMESPACE, UTS_NAMESPACE, namespaces};
use crate::helper::POD_INIT;
use crate::helper::pod_init::CONFINED;

/// Maximum time to wait for the namespace: until its PID 1 is confined, or until another request has created the
/// namespace.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Arguments of the namespace's PID 1.
const ARGS: [&str; 4] = [POD_INIT, NET_NAMESPACE, IPC_NAMESPACE, UTS_NAMESPACE];
/// Maximum size of an error that PID 1 reports, in bytes.
const MAX_ERROR: usize = 4096;

/// The shared PID namespace of a pod.
#[derive(Default)]
pub struct SharedPid(OnceCell<()>);

impl SharedPid {
    /// Unless the namespace exists, creates it, starts its PID 1 and pins the namespace at `pin`. If `user_namespace`
    /// is given, that user namespace owns the PID namespace.
    ///
    /// # Errors
    /// After an error, no process remains, and the next call retries.
    pub async fn create(&self, pin: &'static Path, user_namespace: Option<&'static Path>) -> io::Result<()> {
        let start = move || match user_namespace {
            Some(user_namespace) => spawn_in(user_namespace),
            None => spawn(),
        };
        self.create_with(start, move |init| init.pin(pin)).await
    }

    /// Creates the namespace with `start`, and pins it with `pin`, which may block for long. `start` runs on the
    /// caller's thread, because [`namespaces::spawn`] and [`Init::new`] must not run while the reaper takes exits.
    async fn create_with(
        &self,
        start: impl FnOnce() -> io::Result<Init>,
        pin: impl FnOnce(&Init) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let create = async || {
            let mut init = start()?;
            wait_until_confined(init.output.take()).await?;
            spawn_blocking(move || pin(&init).map(|()| init.keep())).await?
        };
        match timeout(TIMEOUT, self.0.get_or_try_init(create)).await {
            Ok(created) => created.map(|_| ()),
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("PID 1 of the shared PID namespace was not confined within {} s", TIMEOUT.as_secs()),
            )),
        }
    }
}

/// PID 1 of a shared PID namespace. Until [`Init::keep`] is called, the process is killed when this value is dropped.
struct Init {
    process: Option<OwnedFd>,
    namespace: File,
    output: Option<OwnedFd>,
}

impl Init {
    fn new(pid: u32, output: Option<ChildStdout>) -> io::Result<Self> {
        let process = pidfd::open(pid.cast_signed())?;
        let namespace = File::open(format!("/proc/{pid}/ns/pid")).inspect_err(|_| {
            let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
        })?;
        Ok(Self { process: Some(process), namespace, output: output.map(OwnedFd::from) })
    }

    /// Pins the namespace at `pin`.
    fn pin(&self, pin: &Path) -> io::Result<()> {
        File::create(pin)?;
        let namespace = format!("/proc/self/fd/{}", self.namespace.as_raw_fd());
        Ok(mount(Some(namespace.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    }

    /// Lets the process run until the VM ends.
    fn keep(mut self) {
        self.process = None;
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
        }
    }
}

/// Starts PID 1 in a new PID namespace. Blocks for a few milliseconds.
fn spawn() -> io::Result<Init> {
    let current = File::open("/proc/self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = namespaces::spawn(&ARGS, Stdio::piped(), || Ok(()));
    if setns(current.as_fd(), CloneFlags::CLONE_NEWPID).is_err() {
        crate::fatal::die("failed to return to the agent's PID namespace");
    }
    let mut child = child?;
    Init::new(child.id(), child.stdout.take())
}

/// Starts PID 1 in a new PID namespace that the given user namespace owns. Blocks for a few milliseconds.
///
/// unshare(2) puts only children into the new PID namespace. Therefore an intermediate process forks a child, which is
/// the namespace's PID 1. The intermediate process reports the child's PID and exits.
fn spawn_in(user_namespace: &Path) -> io::Result<Init> {
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
    Init::new(u32::from_ne_bytes(pid), intermediate.stdout.take())
}

/// Waits until PID 1, whose standard output is `output`, is confined.
///
/// # Errors
/// Fails if PID 1 could not confine itself.
async fn wait_until_confined(output: Option<OwnedFd>) -> io::Result<()> {
    let text = match output {
        Some(output) => read_to_end(output).await?,
        None => String::new(),
    };
    match text.as_str() {
        CONFINED => Ok(()),
        "" => Err(io::Error::other("PID 1 of the shared PID namespace ended")),
        error => Err(io::Error::other(format!("failed to confine PID 1 of the shared PID namespace: {error}"))),
    }
}

/// Reads at most [`MAX_ERROR`] bytes.
async fn read_to_end(pipe: OwnedFd) -> io::Result<String> {
    set_nonblocking(&pipe)?;
    let pipe = async_fd::register(File::from(pipe), Interest::READABLE)?;
    let (mut bytes, mut filled) = ([0; MAX_ERROR], 0);
    while let Some(unread) = bytes.get_mut(filled..).filter(|unread| !unread.is_empty()) {
        match pipe.async_io(Interest::READABLE, |mut file| file.read(unread)).await? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(String::from_utf8_lossy(bytes.get(..filled).unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use std::io::{PipeWriter, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, ExitStatus};
    use std::thread;

    use super::*;

    /// Returns a process that stands for PID 1, and the write end of its standard output.
    fn init() -> (Init, PipeWriter, Child) {
        let (output, writer) = io::pipe().unwrap();
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let mut init = Init::new(child.id(), None).unwrap();
        init.output = Some(output.into());
        (init, writer, child)
    }

    /// Ends the process, unless it has been killed.
    fn end(mut child: Child) -> ExitStatus {
        drop(child.stdin.take());
        child.wait().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn create_kills_a_process_that_is_not_confined_in_time() {
        let shared = SharedPid::default();
        let (init, mut writer, child) = init();
        writer.write_all(CONFINED.as_bytes()).unwrap();
        // The process hangs before it closes the pipe.
        let created = timeout(TIMEOUT * 2, shared.create_with(|| Ok(init), |_| panic!("pinned"))).await;
        let error = created.expect("the wait has no limit").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(end(child).signal(), Some(libc::SIGKILL));
    }

    #[tokio::test(start_paused = true)]
    async fn create_starts_pid_1_on_the_async_thread_and_only_once() {
        let shared = SharedPid::default();
        let async_thread = thread::current().id();
        let (init, mut writer, child) = init();
        writer.write_all(CONFINED.as_bytes()).unwrap();
        drop(writer);
        // The reaper cannot take the exit of a child that the async thread is starting.
        let start = move || {
            assert_eq!(thread::current().id(), async_thread);
            Ok(init)
        };
        let pin = move |_: &Init| {
            assert_ne!(thread::current().id(), async_thread);
            Ok(())
        };
        shared.create_with(start, pin).await.unwrap();
        shared.create_with(|| panic!("started again"), |_| Ok(())).await.unwrap();
        assert!(end(child).success());
    }

    #[tokio::test(start_paused = true)]
    async fn create_reports_the_error_of_pid_1_and_retries() {
        let shared = SharedPid::default();
        for (text, expected) in [("no tmpfs", "no tmpfs"), ("", "ended")] {
            let (init, mut writer, child) = init();
            writer.write_all(text.as_bytes()).unwrap();
            drop(writer);
            let error = shared.create_with(|| Ok(init), |_| panic!("pinned")).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(end(child).signal(), Some(libc::SIGKILL));
        }
    }
}
