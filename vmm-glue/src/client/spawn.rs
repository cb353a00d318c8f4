//! Starts the VMM process with clone(2) and execve(2). The clone has the flags of vfork(2), and CLONE_NEWPID. The child
//! sets its network namespace and its control socket before it calls execve.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{ARGV0, CONTROL_FD};
use crate::control::{PROTOCOL, wire};

/// Stack size in bytes of the child between clone and exec.
const STACK: usize = 64 << 10;

/// The VMM process's network namespace.
#[derive(Debug, Default)]
pub enum Network {
    /// The parent's network namespace.
    #[default]
    Inherit,
    /// A new network namespace. Its only interface is a loopback interface that is down.
    New,
    /// An existing network namespace.
    Join(OwnedFd),
}

/// Options of [`spawn`].
#[derive(Debug)]
pub struct SpawnOptions {
    /// The binary. It must call [`crate::process::main`] if its `argv[0]` is [`ARGV0`].
    pub exe: PathBuf,
    /// The network namespace of the process.
    pub network: Network,
    /// The mount namespace of the process. `None` means the caller's mount namespace.
    pub mount_namespace: Option<OwnedFd>,
    /// The files `cgroup.procs` of the cgroups that the process enters, opened for writing.
    pub cgroups: Vec<OwnedFd>,
    /// Whether the process becomes a child of the caller's parent. If so, the caller's parent has to reap the process,
    /// and the process ends when the caller's parent ends.
    pub sibling: bool,
}

impl Default for SpawnOptions {
    /// Returns options that run the current binary in the parent's network namespace.
    fn default() -> Self {
        Self {
            exe: PathBuf::from("/proc/self/exe"),
            network: Network::Inherit,
            mount_namespace: None,
            cgroups: Vec::new(),
            sibling: false,
        }
    }
}

/// A running VMM process. The process ends when the thread that started it ends, or when the control socket is closed.
/// The process's parent has to reap the process.
#[derive(Debug)]
pub struct Spawned {
    /// The process id.
    pub pid: u32,
    /// A pidfd, which is readable when the process has ended.
    pub pidfd: OwnedFd,
    /// The shim's end of the control socket, in blocking mode.
    pub control: OwnedFd,
}

/// Error from starting the VMM process.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The path contains a NUL byte.
    #[error("invalid path of the VMM binary: it contains a NUL byte")]
    Path,
    /// socketpair failed.
    #[error("failed to create the control socket")]
    Socket(#[source] io::Error),
    /// clone failed.
    #[error("failed to create the VMM process")]
    Clone(#[source] io::Error),
    /// The child could not enter its mount namespace.
    #[error("failed to set the mount namespace of the VMM process")]
    Mounts(#[source] io::Error),
    /// The child could not enter a cgroup.
    #[error("failed to move the VMM process into its cgroup")]
    Cgroup(#[source] io::Error),
    /// The child could not create or enter its network namespace.
    #[error("failed to set the network namespace of the VMM process")]
    Network(#[source] io::Error),
    /// The child could not move its control socket to [`CONTROL_FD`].
    #[error("failed to pass the control socket to the VMM process")]
    Control(#[source] io::Error),
    /// The child could not close the fds that it inherited.
    #[error("failed to close the inherited fds of the VMM process: close_range(2) needs Linux 5.9")]
    Close(#[source] io::Error),
    /// The child could not execute the binary.
    #[error("failed to execute the VMM binary")]
    Exec(#[source] io::Error),
}

/// Data for the child. The parent prepares this data before the clone, because the child must not allocate memory.
struct ExecPlan {
    exe: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    control: RawFd,
    netns: RawFd,
    new_network: bool,
    /// The mount namespace, or -1.
    mntns: RawFd,
    cgroups: *const RawFd,
    cgroup_count: usize,
    /// The failed step and its errno, written by the child.
    failed: (FailedStep, c_int),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FailedStep {
    None,
    Mounts,
    Cgroup,
    Network,
    Control,
    Close,
    Exec,
}

/// Starts a VMM process in a new PID namespace. The process inherits the caller's standard input, output and error, and
/// logs to standard error. All other fds of the caller must be close-on-exec.
pub fn spawn(options: SpawnOptions) -> Result<Spawned, SpawnError> {
    let exe = CString::new(options.exe.into_os_string().into_vec()).map_err(|_| SpawnError::Path)?;
    let argv0 = CString::new(ARGV0).map_err(|_| SpawnError::Path)?;
    let protocol = CString::new(PROTOCOL.to_string()).map_err(|_| SpawnError::Path)?;
    // Pass only the environment variable that the VMM reads.
    let log = std::env::var("HUSK_VMM_LOG").ok().and_then(|level| CString::new(format!("HUSK_VMM_LOG={level}")).ok());
    let argv = [argv0.as_ptr(), protocol.as_ptr(), std::ptr::null()];
    let envp = [log.as_deref().map_or(std::ptr::null(), CStr::as_ptr), std::ptr::null()];
    let (parent_end, child_end) = wire::pair().map_err(SpawnError::Socket)?;
    let cgroups: Vec<RawFd> = options.cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    let mut plan = ExecPlan {
        exe: exe.as_ptr(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        control: child_end.as_raw_fd(),
        netns: match &options.network {
            Network::Join(netns) => netns.as_raw_fd(),
            Network::Inherit | Network::New => -1,
        },
        new_network: matches!(options.network, Network::New),
        mntns: options.mount_namespace.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        cgroups: cgroups.as_ptr(),
        cgroup_count: cgroups.len(),
        failed: (FailedStep::None, 0),
    };
    let (pid, pidfd) = clone_and_exec(&mut plan, options.sibling).map_err(SpawnError::Clone)?;
    let (step, errno) = plan.failed;
    let error = io::Error::from_raw_os_error(errno);
    let error = match step {
        FailedStep::None => return Ok(Spawned { pid, pidfd, control: parent_end }),
        FailedStep::Mounts => SpawnError::Mounts(error),
        FailedStep::Cgroup => SpawnError::Cgroup(error),
        FailedStep::Network => SpawnError::Network(error),
        FailedStep::Control => SpawnError::Control(error),
        FailedStep::Close => SpawnError::Close(error),
        FailedStep::Exec => SpawnError::Exec(error),
    };
    // The pid cannot have been reused, because nobody has waited for the child. This wait fails for a sibling, which
    // is a child of the caller's parent. A failed sibling stays a zombie until the parent ends, because the parent does
    // not learn the sibling's pid.
    let _ = husk_base::sys::process::wait(pid.cast_signed(), 0);
    Err(error)
}

/// Creates a child that shares this process's memory, so that no page tables are copied. Returns when the child has
/// called execve or has ended.
fn clone_and_exec(plan: &mut ExecPlan, sibling: bool) -> io::Result<(u32, OwnedFd)> {
    let mut stack = vec![0u128; STACK / 16];
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::CLONE_NEWPID | libc::SIGCHLD;
    let flags = if sibling { flags | libc::CLONE_PARENT } else { flags };
    // SAFETY: `top` is the 16-byte-aligned end of a stack that is large enough for a few system calls. CLONE_VFORK
    // suspends this thread until the child has called execve or ended. Therefore `plan` and `stack` outlive the child's
    // use of them. All signals are blocked, so that no signal handler runs in the child, which shares this memory. The
    // VMM unblocks signals after execve. A successful clone has stored a new fd in `pidfd`. Nothing else owns this fd.
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

/// Main function of the child between clone and exec. This function only makes system calls.
extern "C" fn child(plan: *mut c_void) -> c_int {
    let plan = plan.cast::<ExecPlan>();
    // SAFETY: `plan` points to the parent's [`ExecPlan`], which nobody else uses while CLONE_VFORK suspends the parent.
    // Its strings end with NUL and its arrays with a null pointer, as execve requires. `cgroups` has `cgroup_count`
    // elements.
    unsafe {
        if (*plan).mntns != -1 && libc::setns((*plan).mntns, libc::CLONE_NEWNS) != 0 {
            return fail(plan, FailedStep::Mounts);
        }
        for index in 0..(*plan).cgroup_count {
            // The kernel takes 0 as the calling process (cgroups(7)).
            if libc::write(*(*plan).cgroups.add(index), c"0".as_ptr().cast(), 1) != 1 {
                return fail(plan, FailedStep::Cgroup);
            }
        }
        let network = match ((*plan).netns, (*plan).new_network) {
            (-1, false) => 0,
            (-1, true) => libc::unshare(libc::CLONE_NEWNET),
            (netns, _) => libc::setns(netns, libc::CLONE_NEWNET),
        };
        if network != 0 {
            return fail(plan, FailedStep::Network);
        }
        // dup2 clears close-on-exec, but not if both fds are the same.
        let placed = if (*plan).control == CONTROL_FD {
            libc::fcntl(CONTROL_FD, libc::F_SETFD, 0)
        } else {
            libc::dup2((*plan).control, CONTROL_FD)
        };
        if placed < 0 {
            return fail(plan, FailedStep::Control);
        }
        // The call does not close the parent's fds. The child has its own copy of the fd table, because the clone does
        // not have CLONE_FILES.
        if libc::syscall(libc::SYS_close_range, CONTROL_FD + 1, c_int::MAX, 0) != 0 {
            return fail(plan, FailedStep::Close);
        }
        libc::execve((*plan).exe, (*plan).argv, (*plan).envp);
        fail(plan, FailedStep::Exec)
    }
}

/// Stores the failed step and its errno for the parent.
unsafe fn fail(plan: *mut ExecPlan, step: FailedStep) -> c_int {
    // SAFETY: `plan` is valid and unshared, as in `child`. The errno location is valid, because the child shares the
    // thread-local storage of the suspended parent thread.
    unsafe { (*plan).failed = (step, *libc::__errno_location()) };
    127
}
