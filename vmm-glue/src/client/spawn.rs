//! Starts the VMM process: like vfork and exec, with what has to happen in between.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{ARGV0, CONTROL_FD};
use crate::control::wire;

/// Stack of the child between clone and exec.
const STACK: usize = 64 << 10;

/// The network namespace of the VMM process.
#[derive(Debug, Default)]
pub enum Network {
    /// The parent's.
    #[default]
    Inherit,
    /// A new one, empty but for a loopback interface that is down.
    New,
    /// This one.
    Join(OwnedFd),
}

/// How to start a VMM process.
#[derive(Debug)]
pub struct SpawnOptions {
    /// The binary, which calls [`crate::child::main`] when its name is [`ARGV0`].
    pub exe: PathBuf,
    /// Its network namespace.
    pub network: Network,
}

impl Default for SpawnOptions {
    /// The binary that is running, in the network namespace it has.
    fn default() -> Self {
        Self { exe: PathBuf::from("/proc/self/exe"), network: Network::Inherit }
    }
}

/// A started VMM process. It dies with the thread that started it, and when the control socket is closed; its parent
/// has to wait for it.
#[derive(Debug)]
pub struct Spawned {
    /// Its process id.
    pub pid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Our end of the control socket, blocking.
    pub control: OwnedFd,
}

/// Why no VMM process was started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The path has a NUL in it.
    #[error("the path of the VMM binary is no path")]
    Path,
    /// Socket pair.
    #[error("cannot create the control socket")]
    Socket(#[source] io::Error),
    /// Clone.
    #[error("cannot create the VMM process")]
    Clone(#[source] io::Error),
    /// The child could not enter or make its network namespace.
    #[error("cannot set the network namespace of the VMM process")]
    Network(#[source] io::Error),
    /// The child could not place its control socket.
    #[error("cannot pass the control socket")]
    Control(#[source] io::Error),
    /// The child could not execute the binary.
    #[error("cannot execute the VMM binary")]
    Exec(#[source] io::Error),
}

/// What the child needs; plain data, prepared before the clone, for the child must not allocate.
struct Plan {
    exe: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    control: RawFd,
    netns: RawFd,
    new_network: bool,
    /// Written by the child when a step fails: which, and errno.
    failed: (Step, c_int),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    None,
    Network,
    Control,
    Exec,
}

/// Starts a VMM process. Every other descriptor of the caller must be close-on-exec; standard error is shared, it is
/// where the VMM logs.
///
/// # Errors
/// [`SpawnError`].
pub fn spawn(options: SpawnOptions) -> Result<Spawned, SpawnError> {
    let exe = CString::new(options.exe.into_os_string().into_vec()).map_err(|_| SpawnError::Path)?;
    let argv0 = CString::new(ARGV0).map_err(|_| SpawnError::Path)?;
    // Of the environment only what the VMM itself looks at.
    let log = std::env::var("HUSK_VMM_LOG").ok().and_then(|level| CString::new(format!("HUSK_VMM_LOG={level}")).ok());
    let argv = [argv0.as_ptr(), std::ptr::null()];
    let envp = [log.as_deref().map_or(std::ptr::null(), CStr::as_ptr), std::ptr::null()];
    let (ours, theirs) = wire::pair().map_err(SpawnError::Socket)?;
    let mut plan = Plan {
        exe: exe.as_ptr(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        control: theirs.as_raw_fd(),
        netns: match &options.network {
            Network::Join(netns) => netns.as_raw_fd(),
            Network::Inherit | Network::New => -1,
        },
        new_network: matches!(options.network, Network::New),
        failed: (Step::None, 0),
    };
    let (pid, pidfd) = clone_and_exec(&mut plan).map_err(SpawnError::Clone)?;
    let (step, errno) = plan.failed;
    let error = io::Error::from_raw_os_error(errno);
    let error = match step {
        Step::None => return Ok(Spawned { pid, pidfd, control: ours }),
        Step::Network => SpawnError::Network(error),
        Step::Control => SpawnError::Control(error),
        Step::Exec => SpawnError::Exec(error),
    };
    // SAFETY: the child is ours and has ended; nothing is written through the null pointer.
    unsafe { libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0) };
    Err(error)
}

/// Clones with shared memory, so that nothing is copied, and waits until the child has executed or ended.
fn clone_and_exec(plan: &mut Plan) -> io::Result<(u32, OwnedFd)> {
    let mut stack = vec![0u128; STACK / 16];
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is aligned and large enough for a few system calls; plan and stack outlive the child's use of
    // them, because CLONE_VFORK holds this thread until the child has executed or ended. Signals are blocked
    // meanwhile, so that no handler of ours runs in the child; it executes with them blocked, and unblocks them.
    unsafe {
        let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &raw mut old);
        let top = stack.as_mut_ptr().add(stack.len());
        let pid = libc::clone(child, top.cast(), flags, std::ptr::from_mut(plan).cast(), &raw mut pidfd);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        match u32::try_from(pid) {
            Ok(pid) => Ok((pid, OwnedFd::from_raw_fd(pidfd))),
            Err(_) => Err(error),
        }
    }
}

/// The child between clone and exec: system calls only.
extern "C" fn child(plan: *mut c_void) -> c_int {
    let plan = plan.cast::<Plan>();
    // SAFETY: the parent waits and lends us its plan; the strings and arrays in it end as execve needs.
    unsafe {
        let network = match ((*plan).netns, (*plan).new_network) {
            (-1, false) => 0,
            (-1, true) => libc::unshare(libc::CLONE_NEWNET),
            (netns, _) => libc::setns(netns, libc::CLONE_NEWNET),
        };
        if network != 0 {
            return fail(plan, Step::Network);
        }
        // dup2 clears close-on-exec, except onto itself.
        let placed = if (*plan).control == CONTROL_FD {
            libc::fcntl(CONTROL_FD, libc::F_SETFD, 0)
        } else {
            libc::dup2((*plan).control, CONTROL_FD)
        };
        if placed < 0 {
            return fail(plan, Step::Control);
        }
        libc::execve((*plan).exe, (*plan).argv, (*plan).envp);
        fail(plan, Step::Exec)
    }
}

/// Tells the parent what went wrong.
unsafe fn fail(plan: *mut Plan, step: Step) -> c_int {
    // SAFETY: as in `child`; errno is this thread's, which is the parent's while it waits.
    unsafe { (*plan).failed = (step, *libc::__errno_location()) };
    127
}
