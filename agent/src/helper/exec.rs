//! Starts an exec in a container. The steps have the same order as in runc's `setns` init.
//!
//! libcontainer's exec builder does not apply the seccomp filter and does not check the supplementary groups. The
//! builder also changes the order of the environment variables. Therefore this module uses only the parts of
//! libcontainer that set resource limits, AppArmor profiles, capabilities and seccomp filters.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use husk_base::error::chain;
use husk_base::sys::fd::close_on_exec_from;
use husk_base::sys::pidfd;
use husk_base::sys::process::{Cloned, clone_sibling_into};
use libcontainer::oci_spec::runtime::Process;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{apparmor, capabilities, seccomp};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, close, setgroups, setresgid, setresuid, setsid};

use super::executor::{errno_text, exec_program, home_directory};
use super::protocol::ExecRequest;
use super::{error_log, terminal};

/// `CLONE_NEWTIME` of linux/sched.h.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// Starts the process. Returns its PID as soon as the process has executed its program.
///
/// # Errors
/// Returns the reason, in the wording of runc's errors.
pub fn run(request: Box<ExecRequest>) -> Result<i32, String> {
    let io = |what: &'static str| move |error: io::Error| format!("{what}: {}", io_error_text(&error));
    let console = request
        .console
        .as_ref()
        .map(UnixStream::connect)
        .transpose()
        .map_err(io("failed to connect to the console socket"))?;
    let mut pid_pipe = open_pid_pipe(request.pid_pipe).map_err(io("failed to open the pipe for the PID"))?;
    let init = pidfd::open(request.init_pid).map_err(io("cannot exec in a stopped container"))?;
    let cgroups = open_cgroups(&request).map_err(io("failed to open the cgroup"))?;
    let (mut reasons, reason_writer) = io::pipe().map_err(io("failed to create a pipe for the child's error"))?;
    let namespaces = namespaces_to_join(init.as_fd(), request.init_pid)
        .map_err(io("failed to read the namespaces of the container"))?;
    unshare_time();
    // setns(2) with a PID namespace takes effect only for children that the caller creates later.
    set_namespaces(&init, namespaces & CloneFlags::CLONE_NEWPID).map_err(io("failed to enter the PID namespace"))?;
    let pid = match clone_into(&cgroups).map_err(io("failed to clone the process"))? {
        0 => {
            drop((reasons, pid_pipe));
            let reason = child(&request, &init, namespaces - CloneFlags::CLONE_NEWPID, console);
            let _ = (&reason_writer).write_all(reason.as_bytes());
            std::process::exit(1)
        }
        pid => pid,
    };
    // The new process may hang before it executes its program, for example because its cgroup is frozen. With the PID,
    // the agent can kill the process.
    let _ = pid_pipe.write_all(&pid.to_ne_bytes());
    drop(reason_writer);
    drop(console);
    let mut reason = String::new();
    // The child's end of the pipe closes when the child executes its program or exits.
    reasons.read_to_string(&mut reason).map_err(io("failed to read the child's error from the pipe"))?;
    if reason.is_empty() { Ok(pid) } else { Err(reason) }
}

/// Opens the pipe that this process has inherited as the fd `number`, and closes the inherited fd.
fn open_pid_pipe(number: RawFd) -> io::Result<File> {
    let pipe = File::options().write(true).open(format!("/proc/self/fd/{number}"))?;
    close(number)?;
    Ok(pipe)
}

/// Puts the next child into a new time namespace. The clocks of the new namespace equal those of the current namespace,
/// so that the container sees no difference. The child's descendants inherit the namespace. Therefore the agent can
/// identify the descendants by their time namespace (`crate::task::time_namespace`).
fn unshare_time() {
    // The calling process itself stays in its time namespace (time_namespaces(7)).
    if let Err(errno) = unshare(CLONE_NEWTIME) {
        error_log::record(&format!("failed to create a time namespace: {}", io::Error::from(errno)));
    }
}

/// Runs in the new process: prepares it and executes its program. Returns only on failure, with the reason.
fn child(request: &ExecRequest, init: &OwnedFd, namespaces: CloneFlags, console: Option<UnixStream>) -> String {
    match prepare(request, init, namespaces, console) {
        Ok(home) => exec_program(&request.process, Some(&home)),
        Err(reason) => reason,
    }
}

fn prepare(
    request: &ExecRequest,
    init: &OwnedFd,
    namespaces: CloneFlags,
    console: Option<UnixStream>,
) -> Result<String, String> {
    let process = &request.process;
    let syscall = create_syscall();
    let syscall = syscall.as_ref();
    setsid().map_err(|errno| format!("failed to create a session: {}", errno_text(errno)))?;
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|e| format!("failed to set oom_score_adj: {e}"))?;
    }
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit).map_err(|error| format!("error setting rlimits: {error}"))?;
    }
    set_namespaces(init, namespaces)
        .map_err(|error| format!("failed to enter the namespaces of the container: {}", io_error_text(&error)))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        set_id(0, 0)?;
    }
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        let _ = prctl::set_no_new_privs();
    }
    if let Some(console) = console {
        terminal::attach(&console, process)
            .map_err(|error| format!("failed to set up the terminal: {}", io_error_text(&error)))?;
    }
    if let Some(profile) = process.apparmor_profile() {
        apparmor::apply_profile(profile).map_err(|error| chain(&error))?;
    }
    if let Some(mask) = process.user().umask() {
        umask(Mode::from_bits_truncate(mask & 0o777));
    }
    let entered = change_directory(process.cwd());
    set_user_and_groups(process)?;
    let _ = close_on_exec_from(3);
    let filter = || match &request.seccomp {
        Some(filter) => seccomp::initialize_seccomp(filter).map(|_| ()).map_err(|error| chain(&error)),
        None => Ok(()),
    };
    if !no_new_privileges {
        // Without no_new_privs, loading a filter needs CAP_SYS_ADMIN, which the next steps drop.
        filter()?;
    }
    capabilities::reset_effective(syscall).map_err(|error| chain(&error))?;
    if let Some(set) = process.capabilities() {
        capabilities::drop_privileges(set, syscall).map_err(|error| chain(&error))?;
    }
    // On a network file system, root may have no access to the working directory although the process's user has
    // access. Therefore retry as that user.
    entered.or_else(|_| change_directory(process.cwd()))?;
    std::env::current_dir()
        .map_err(|_| "current working directory is outside of container mount namespace root".to_owned())?;
    let home = home_directory(process.user().uid());
    if no_new_privileges {
        filter()?;
    }
    Ok(home)
}

fn set_user_and_groups(process: &Process) -> Result<(), String> {
    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().copied().map(Gid::from_raw).collect();
    // A user namespace can deny setgroups(2). In this case, a request without groups needs no call, because the helper
    // has no supplementary groups to drop.
    let denied = std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny");
    if !denied || !groups.is_empty() {
        setgroups(&groups).map_err(|errno| format!("failed to set the supplementary groups: {}", errno_text(errno)))?;
    }
    set_id(user.uid(), user.gid())
}

/// Sets `uid` and `gid` and keeps the permitted capabilities for the next steps. The process has one thread, so no
/// other thread keeps the old identity.
fn set_id(uid: u32, gid: u32) -> Result<(), String> {
    let failed = |action: &'static str| move |errno| format!("failed to {action}: {}", errno_text(errno));
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    prctl::set_keepcaps(true).map_err(failed("set PR_SET_KEEPCAPS"))?;
    setresgid(gid, gid, gid).map_err(failed("set the gid"))?;
    setresuid(uid, uid, uid).map_err(failed("set the uid"))?;
    prctl::set_keepcaps(false).map_err(failed("clear PR_SET_KEEPCAPS"))
}

fn change_directory(cwd: &Path) -> Result<(), String> {
    if cwd.as_os_str().is_empty() {
        return Ok(());
    }
    std::env::set_current_dir(cwd)
        .map_err(|error| format!("chdir to cwd ({:?}) set in config.json failed: {}", cwd, io_error_text(&error)))
}

/// Opens the cgroups that the process can join, in order of preference: the container's cgroup, then the cgroup of the
/// container's init. The container's cgroup accepts no process if the container has enabled controllers for child
/// cgroups (cgroups(7)).
fn open_cgroups(request: &ExecRequest) -> io::Result<Vec<File>> {
    let container = File::open(&request.cgroup)?;
    let line = std::fs::read_to_string(format!("/proc/{}/cgroup", request.init_pid))?;
    let name = line.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let of_init = Path::new(crate::cgroup::MOUNT).join(name);
    if !of_init.starts_with(&request.cgroup) {
        // The container's init has exited, and another process has reused its PID.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(vec![container, File::open(of_init)?])
}

/// Compares the namespaces of the process `process`, whose PID is `pid`, with those of this process. Returns the
/// CLONE_NEW* flags of the namespaces that differ.
///
/// # Errors
/// ESRCH if the process has been reaped. In this case, another process may have got its PID.
fn namespaces_to_join(process: BorrowedFd<'_>, pid: i32) -> io::Result<CloneFlags> {
    const KINDS: &[(&str, CloneFlags)] = &[
        ("user", CloneFlags::CLONE_NEWUSER),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("time", CLONE_NEWTIME),
    ];
    let mut flags = CloneFlags::empty();
    for (name, flag) in KINDS {
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        if theirs != std::fs::read_link(format!("/proc/self/ns/{name}"))? {
            flags |= *flag;
        }
    }
    // The process still has its PID. Therefore, all files that were read before belong to this process.
    pidfd::send_signal(process, 0)?;
    Ok(flags)
}

fn set_namespaces(pidfd: &OwnedFd, flags: CloneFlags) -> io::Result<()> {
    if !flags.is_empty() {
        setns(pidfd, flags)?;
    }
    Ok(())
}

/// Forks a sibling of this process. The sibling starts in the first cgroup of `cgroups` that accepts a process. Returns 0
/// in the sibling.
fn clone_into(cgroups: &[File]) -> io::Result<i32> {
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for cgroup in cgroups {
        // SAFETY: the process has one thread.
        match unsafe { clone_sibling_into(cgroup) } {
            Ok(Cloned::Caller { pid, .. }) => return Ok(pid),
            Ok(Cloned::Sibling) => return Ok(0),
            Err(error) => last = error,
        }
    }
    error_log::record(&format!("failed to clone the process: {last}"));
    Err(last)
}

fn io_error_text(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| errno_text(nix::Error::from_raw(code)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn namespaces_to_join_fails_if_another_process_can_have_the_pid() {
        let own = std::process::id().cast_signed();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd::open(child.id().cast_signed()).unwrap();
        assert_eq!(namespaces_to_join(pidfd.as_fd(), own).unwrap(), CloneFlags::empty());
        child.kill().unwrap();
        child.wait().unwrap();
        let error = namespaces_to_join(pidfd.as_fd(), own).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
