//! Starts a further process in a container: the order of steps is runc's `setns` init.
//!
//! libcontainer's own builder for this drops the seccomp filter, the supplementary groups' check and the order of the
//! environment; the parts of libcontainer that set capabilities, identities and filters are used from here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libcontainer::oci_spec::runtime::Process;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{apparmor, capabilities, seccomp};
use nix::unistd::setsid;

use super::executor::{become_process, home_of, text};
use super::protocol::ExecRequest;
use super::{terminal, trail};
use crate::log::chain;

/// `CLONE_NEWTIME` of linux/sched.h.
const CLONE_NEWTIME: i32 = 0x80;

/// Starts the process and returns its id, once it has become the program it is to be.
///
/// # Errors
/// The reason in runc's form.
pub fn run(request: Box<ExecRequest>) -> Result<i32, String> {
    let io = |what: &'static str| move |error: io::Error| format!("{what}: {}", io_text(&error));
    let console = request.console.as_ref().map(UnixStream::connect).transpose().map_err(io("console socket"))?;
    let init = pidfd(request.init).map_err(io("cannot exec in a stopped container"))?;
    let cgroup = join_target(&request).map_err(io("control group"))?;
    let (mut reasons, reason_writer) = io::pipe().map_err(io("pipe"))?;
    let rest = foreign_namespaces(request.init).map_err(io("namespaces"))?;
    mark();
    // A process namespace is entered by the next child only.
    set_namespaces(&init, rest & libc::CLONE_NEWPID).map_err(io("setns pid"))?;
    let pid = match clone_into(&cgroup).map_err(io("clone"))? {
        0 => {
            drop(reasons);
            let reason = child(&request, &init, rest & !libc::CLONE_NEWPID, console);
            let _ = (&reason_writer).write_all(reason.as_bytes());
            std::process::exit(1)
        }
        pid => pid,
    };
    drop(reason_writer);
    drop(console);
    let mut reason = String::new();
    // The child's end closes when it executes the program, or when it dies.
    reasons.read_to_string(&mut reason).map_err(io("pipe"))?;
    if reason.is_empty() { Ok(pid) } else { Err(reason) }
}

/// Has the next child be in a time namespace of its own, with the clocks of this one: nothing in the container is
/// different by it, whatever the process starts is in it as well, and so the agent can tell what that was
/// (`crate::task::kill`).
fn mark() {
    // SAFETY: unshare takes plain numbers, and this one changes nothing for this process (time_namespaces(7)).
    if unsafe { libc::unshare(CLONE_NEWTIME) } != 0 {
        trail::record(&format!("no time namespace: {}", io::Error::last_os_error()));
    }
}

/// The new process, up to its program; returns only why it failed.
fn child(request: &ExecRequest, init: &OwnedFd, namespaces: i32, console: Option<UnixStream>) -> String {
    match prepare(request, init, namespaces, console) {
        Ok(home) => become_process(&request.process, Some(&home)),
        Err(reason) => reason,
    }
}

fn prepare(
    request: &ExecRequest,
    init: &OwnedFd,
    namespaces: i32,
    console: Option<UnixStream>,
) -> Result<String, String> {
    let process = &request.process;
    let syscall = create_syscall();
    let syscall = syscall.as_ref();
    setsid().map_err(|errno| format!("setsid: {}", text(errno)))?;
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(|e| format!("oom_score_adj: {e}"))?;
    }
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit).map_err(|error| format!("error setting rlimits: {error}"))?;
    }
    set_namespaces(init, namespaces).map_err(|error| format!("setns: {}", io_text(&error)))?;
    if namespaces & libc::CLONE_NEWUSER != 0 {
        set_id(0, 0)?;
    }
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        // SAFETY: this prctl operation takes no pointers.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    }
    if let Some(console) = console {
        terminal::take(&console, process).map_err(|error| format!("terminal: {}", io_text(&error)))?;
    }
    if let Some(profile) = process.apparmor_profile() {
        apparmor::apply_profile(profile).map_err(|error| chain(&error))?;
    }
    if let Some(umask) = process.user().umask() {
        // SAFETY: umask takes no pointers; it only replaces the process's file mode creation mask.
        unsafe { libc::umask(umask & 0o777) };
    }
    let early = enter(process.cwd());
    identity(process)?;
    close_on_exec();
    let filter = || match &request.seccomp {
        Some(filter) => seccomp::initialize_seccomp(filter).map(|_| ()).map_err(|error| chain(&error)),
        None => Ok(()),
    };
    if !no_new_privileges {
        // Loading a filter needs a capability that the next steps take away.
        filter()?;
    }
    capabilities::reset_effective(syscall).map_err(|error| chain(&error))?;
    if let Some(set) = process.capabilities() {
        capabilities::drop_privileges(set, syscall).map_err(|error| chain(&error))?;
    }
    // As root the directory may be out of reach where its user can enter, over a network file system.
    early.or_else(|_| enter(process.cwd()))?;
    std::env::current_dir()
        .map_err(|_| "current working directory is outside of container mount namespace root".to_owned())?;
    let home = home_of(process.user().uid());
    if no_new_privileges {
        filter()?;
    }
    Ok(home)
}

fn identity(process: &Process) -> Result<(), String> {
    let user = process.user();
    let groups: Vec<libc::gid_t> = user.additional_gids().iter().flatten().copied().collect();
    // A user namespace may forbid setgroups; then there is nothing to drop either.
    let denied = std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny");
    if !denied || !groups.is_empty() {
        // SAFETY: the list lives through the call and its length is its own.
        if unsafe { libc::setgroups(groups.len(), groups.as_ptr()) } != 0 {
            return Err(format!("setgroups: {}", text(nix::Error::last())));
        }
    }
    set_id(user.uid(), user.gid())
}

/// Becomes `uid` and `gid`, keeping the permitted capabilities for the steps that follow.
fn set_id(uid: u32, gid: u32) -> Result<(), String> {
    let failed = |what: &str| format!("{what}: {}", text(nix::Error::last()));
    // SAFETY: all of these take plain numbers; the process has one thread, so no other keeps an old identity.
    unsafe {
        if libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0 {
            return Err(failed("keep capabilities"));
        }
        if libc::setresgid(gid, gid, gid) != 0 {
            return Err(failed("setgid"));
        }
        if libc::setresuid(uid, uid, uid) != 0 {
            return Err(failed("setuid"));
        }
        if libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) != 0 {
            return Err(failed("keep capabilities"));
        }
    }
    Ok(())
}

fn enter(cwd: &Path) -> Result<(), String> {
    if cwd.as_os_str().is_empty() {
        return Ok(());
    }
    std::env::set_current_dir(cwd)
        .map_err(|error| format!("chdir to cwd ({:?}) set in config.json failed: {}", cwd, io_text(&error)))
}

fn close_on_exec() {
    // SAFETY: close_range with this flag only marks descriptors; none is closed under anybody's feet.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// The container's group, or, where it has given its controllers to groups below it and takes no process any more,
/// the one its init is in.
fn join_target(request: &ExecRequest) -> io::Result<Vec<File>> {
    let own = File::open(&request.cgroup)?;
    let line = std::fs::read_to_string(format!("/proc/{}/cgroup", request.init))?;
    let name = line.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let of_init = Path::new(crate::cgroup::MOUNT).join(name);
    if !of_init.starts_with(&request.cgroup) {
        // The number was given to another process: the container's init is gone.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(vec![own, File::open(of_init)?])
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just returned this fd; nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kinds of namespace in which `pid` is elsewhere than this process.
fn foreign_namespaces(pid: i32) -> io::Result<i32> {
    const KINDS: &[(&str, i32)] = &[
        ("user", libc::CLONE_NEWUSER),
        ("pid", libc::CLONE_NEWPID),
        ("mnt", libc::CLONE_NEWNS),
        ("net", libc::CLONE_NEWNET),
        ("ipc", libc::CLONE_NEWIPC),
        ("uts", libc::CLONE_NEWUTS),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("time", CLONE_NEWTIME),
    ];
    let mut flags = 0;
    for (name, flag) in KINDS {
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        if theirs != std::fs::read_link(format!("/proc/self/ns/{name}"))? {
            flags |= flag;
        }
    }
    Ok(flags)
}

fn set_namespaces(pidfd: &OwnedFd, flags: i32) -> io::Result<()> {
    // SAFETY: setns takes no pointers.
    if flags != 0 && unsafe { libc::setns(pidfd.as_raw_fd(), flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `struct clone_args` of linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks a sibling, born in the first of `groups` that takes it.
fn clone_into(groups: &[File]) -> io::Result<i32> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for group in groups {
        let args = CloneArgs {
            flags: libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP,
            cgroup: u64::from(group.as_raw_fd().unsigned_abs()),
            ..Default::default()
        };
        // SAFETY: without a stack and CLONE_VM this is fork(2); the process has one thread, so the child's copy of all
        // locks is free. The arguments live through the call.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        match i32::try_from(pid) {
            Ok(pid) if pid >= 0 => return Ok(pid),
            _ => last = io::Error::last_os_error(),
        }
    }
    trail::record(&format!("clone: {last}"));
    Err(last)
}

fn io_text(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| text(nix::Error::from_raw(code)))
}
