//! The program that connects to a socket of the node and relays the data.
//!
//! The launcher starts one process of this program for each connection. Daemons of the node authenticate a client by
//! the credentials of its socket (SO_PEERCRED in unix(7)) and by its PID. Therefore, the process has the user and the
//! groups of the container's process, starts in the pod's cgroup, and stays until the connection ends.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use husk_base::relay::{self, Near};
use husk_base::sys::capabilities::{self, Capabilities};
use husk_proto::host_socket::reply;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::launcher::{ProgramOptions, StartCgroup};
use crate::vm::host_socket::Credentials;

/// `argv[0]` of the program.
pub const ARGV0: &str = "husk-host-socket";
/// Timeout of connect(2), which waits while the backlog of the socket is full.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Fd of the stream to the guest.
const STREAM: RawFd = 0;
/// Fd of the socket, opened with O_PATH. Fd 2 is /dev/null.
const SOCKET: RawFd = 1;
/// Name of the process (comm in proc(5)).
const NAME: &std::ffi::CStr = c"husk-socket";
/// Bit of CAP_DAC_OVERRIDE (linux/capability.h).
const DAC_OVERRIDE: u64 = 1 << 1;

/// Returns the arguments for the program.
pub fn args(credentials: &Credentials) -> Vec<String> {
    let Credentials { uid, gid, groups } = credentials;
    [uid, gid].into_iter().chain(groups).map(u32::to_string).collect()
}

/// Returns how the launcher starts the program. `args` are those of [`args`], `fds` are the stream to the guest, the
/// socket, and /dev/null.
pub fn options<'a>(
    args: &'a [String],
    fds: &'a [BorrowedFd<'a>; 3],
    cgroup: Option<&'a StartCgroup>,
) -> ProgramOptions<'a> {
    ProgramOptions {
        // The launcher is a process of the shim's program.
        path: Path::new("/proc/self/exe"),
        arg0: Some(ARGV0),
        args,
        env: Some(Vec::new()),
        cwd: Some(Path::new("/")),
        fds,
        cgroup,
        kill_on_drop: true,
    }
}

/// Parses the arguments of [`args`].
fn parse(args: impl Iterator<Item = OsString>) -> Option<Credentials> {
    let mut numbers = args.map(|arg| arg.to_str()?.parse::<u32>().ok());
    let (uid, gid) = (numbers.next()??, numbers.next()??);
    Some(Credentials { uid, gid, groups: numbers.collect::<Option<_>>()? })
}

/// Runs the program. `args` are the arguments after `argv[0]`.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let _ = prctl::set_name(NAME);
    // SAFETY: the launcher has passed the stream as this fd, and nothing else in this process uses it.
    let mut stream = unsafe { UnixStream::from_raw_fd(STREAM) };
    let connected = match parse(args) {
        Some(credentials) => connect_as(&credentials),
        None => Err(io::ErrorKind::InvalidInput.into()),
    };
    let code = connected.as_ref().map_or_else(|e| reply(e.raw_os_error().unwrap_or(libc::EIO)), |_| 0);
    let replied = stream.write_all(&[code]);
    match (connected, replied) {
        (Ok(daemon), Ok(())) => relay(stream, daemon).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS),
        _ => ExitCode::FAILURE,
    }
}

/// Blocks the signals with which systemd stops the processes of the pod's scope. The connection ends with the pod. Until
/// then, the containers can use it, as under runc.
fn block_termination() -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    Ok(signals.thread_block()?)
}

/// Becomes the user of the container's process, and connects.
fn connect_as(credentials: &Credentials) -> io::Result<UnixStream> {
    block_termination()?;
    // SAFETY: the launcher has passed the socket as this fd, and nothing else in this process uses it.
    let target = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    // Without this, the process would keep the low score that it inherits from containerd.
    std::fs::write("/proc/self/oom_score_adj", "0")?;
    become_user(credentials)?;
    let connection = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::new(i64::try_from(CONNECT_TIMEOUT.as_secs()).unwrap_or(i64::MAX), 0);
    setsockopt(&connection, sockopt::SendTimeout, &limit)?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}", target.as_raw_fd()).as_str())?;
    connect(connection.as_raw_fd(), &address).map_err(|errno| match errno {
        // The timeout has expired.
        nix::Error::EAGAIN => nix::Error::ETIMEDOUT,
        other => other,
    })?;
    keep_capabilities(0)?;
    Ok(connection.into())
}

/// Gives up all privileges except those that the container's process has for connect(2).
///
/// The guest's kernel has already checked whether the process may write to the socket. Root has CAP_DAC_OVERRIDE in
/// most containers, and needs it for the sockets of other users.
fn become_user(credentials: &Credentials) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(credentials.uid), Gid::from_raw(credentials.gid));
    prctl::set_no_new_privs()?;
    for number in 0..capabilities::count()? {
        capabilities::drop_from_bounding_set(number)?;
    }
    setgroups(&credentials.groups.iter().copied().map(Gid::from_raw).collect::<Vec<_>>())?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    keep_capabilities(if uid.is_root() { DAC_OVERRIDE } else { 0 })?;
    // For root, the changes above leave the process dumpable. Other processes of this user must not trace it.
    prctl::set_dumpable(false)?;
    // A change of credentials resets the signal.
    Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)
}

fn keep_capabilities(kept: u64) -> io::Result<()> {
    capabilities::set(Capabilities { effective: kept, permitted: kept, inheritable: 0 })
}

/// Relays the data until the connection ends.
fn relay(stream: UnixStream, daemon: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    daemon.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let daemon = tokio::net::UnixStream::from_std(daemon)?;
        relay::relay(stream, daemon, Near::Relay).await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_reverses_args() {
        for groups in [vec![], vec![5, 7]] {
            let credentials = Credentials { uid: 1, gid: 2, groups };
            let args = args(&credentials).into_iter().map(OsString::from);
            assert_eq!(parse(args), Some(credentials));
        }
        for bad in [vec![], vec!["0"], vec!["0", "x"], vec!["0", "1", "-1"]] {
            assert_eq!(parse(bad.into_iter().map(OsString::from)), None);
        }
    }
}
