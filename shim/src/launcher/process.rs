//! The launcher's process, which serves requests until the shim closes its end of the socket. The process has a single
//! thread, and waits only for requests.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use husk_base::sys::fd::{close_all_except, copy_to, duplicate_from};
use husk_base::sys::process::{Cloned, clone_sibling, clone_sibling_into, exit_immediately};
use husk_base::sys::scm_rights::{self, Packet};
use husk_vmm::client::{Network, SpawnOptions, spawn};
use nix::sys::signal::{SigSet, Signal};

use super::request::{Cgroup, Reply, Request};
use crate::chain;

/// Maximum size of a request in bytes. Linux allows 6 MiB for arguments and environment (fs/exec.c), and their encoding
/// as JSON can be longer.
const MAX_REQUEST: u64 = 32 << 20;
/// Name of the process (comm in proc(5)).
const NAME: &std::ffi::CStr = c"husk-launcher";

/// Serves requests on `socket`, and ends the process.
pub fn run(socket: &OwnedFd) -> ! {
    let _ = nix::sys::prctl::set_name(NAME);
    // This process is suspended while it starts a VMM. Then it does not see that the shim has closed the socket.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    // systemd sends SIGTERM to all processes of a pod at once. The shim may still need the launcher to end the pod.
    let blocked: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    let _ = blocked.thread_block();
    // This process has inherited the shim's end of `socket`. While this copy is open, the kernel does not report that
    // the shim has closed its end. The shim's listener must be closed, too. Otherwise, clients could still connect
    // after the end of the shim, although nobody would serve them.
    // SAFETY: no code of this process uses a closed fd again, because this function never returns.
    if unsafe { close_all_except(socket) }.is_err() {
        exit_immediately(1);
    }
    loop {
        match scm_rights::receive(socket, &mut [0; 16]) {
            Ok(packet) if packet.len == 0 => exit_immediately(0),
            Ok(packet) => serve(packet),
            Err(_) => exit_immediately(1),
        }
    }
}

/// Handles a request. Reports a failure on the request's socket. Ignores a request without a socket.
fn serve(packet: Packet) {
    let mut fds = packet.fds.into_iter();
    let (Some(file), Some(reply)) = (fds.next(), fds.next()) else { return };
    let fds: Vec<OwnedFd> = fds.collect();
    if packet.lost_fds {
        // Some fds are missing, because this process has reached its fd limit.
        let _ = Reply::send_failed(&reply, &nix::Error::EMFILE.into());
        return;
    }
    let result = match read(file) {
        Ok(Request::Vmm) => start_vmm(&reply, fds),
        Ok(Request::Program { path, arg0, args, env, cwd, cgroup }) => {
            let mut command = Command::new(OsStr::from_bytes(&path));
            command.args(args);
            if let Some(name) = arg0 {
                command.arg0(name);
            }
            if let Some(env) = env {
                command.env_clear().envs(env);
            }
            if let Some(cwd) = cwd {
                command.current_dir(OsStr::from_bytes(&cwd));
            }
            start_program(&reply, command, fds, cgroup)
        }
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        // Ignore an error, because the shim may no longer wait for the answer.
        let _ = Reply::send_failed(&reply, &error);
    }
}

fn read(file: OwnedFd) -> io::Result<Request> {
    let mut bytes = Vec::new();
    File::from(file).take(MAX_REQUEST).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn start_vmm(reply: &OwnedFd, fds: Vec<OwnedFd>) -> io::Result<()> {
    let mut fds = fds.into_iter();
    let (Some(mounts), Some(network)) = (fds.next(), fds.next()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let options = SpawnOptions {
        network: Network::Join(network),
        mount_namespace: Some(mounts),
        cgroups: fds.collect(),
        sibling: true,
        ..SpawnOptions::default()
    };
    match spawn(options) {
        Ok(vmm) => Reply::send_started(reply, vmm.pid.cast_signed(), &[vmm.pidfd.as_fd(), vmm.control.as_fd()]),
        Err(error) => Reply::send_error(reply, &chain(&error)),
    }
}

fn start_program(reply: &OwnedFd, mut command: Command, mut fds: Vec<OwnedFd>, cgroup: Cgroup) -> io::Result<()> {
    let count = match cgroup {
        Cgroup::Launcher => 0,
        Cgroup::V2 => 1,
        Cgroup::V1(count) => count,
    };
    let files = fds.split_off(fds.len().checked_sub(count).ok_or(io::ErrorKind::InvalidInput)?);
    let cloned = match (cgroup, files.as_slice()) {
        // SAFETY: this process has a single thread.
        (Cgroup::V2, [directory]) => unsafe { clone_sibling_into(directory) },
        // SAFETY: as above.
        _ => unsafe { clone_sibling() },
    };
    match cloned? {
        Cloned::Caller { pid, pidfd } => Reply::send_started(reply, pid, &[pidfd.as_fd()]),
        Cloned::Sibling => {
            // The program would inherit the signal mask, also over execve(2), and could not be ended by SIGTERM.
            let _ = SigSet::empty().thread_set_mask();
            // The program inherits each standard stream that `fds` does not replace from this process.
            let entered = if matches!(cgroup, Cgroup::V1(_)) { enter(&files) } else { Ok(()) };
            let _ = match entered.and_then(|()| place(&fds, reply)) {
                Ok(reply) => Reply::send_failed(&reply, &command.exec()),
                Err(error) => Reply::send_failed(reply, &error),
            };
            exit_immediately(127);
        }
    }
}

/// Moves this process to cgroups. `procs` are their open files `cgroup.procs`.
fn enter(procs: &[OwnedFd]) -> io::Result<()> {
    procs.iter().try_for_each(|file| nix::unistd::write(file, b"0").map(drop).map_err(io::Error::from))
}

/// Duplicates `fds` to the numbers 0, 1, 2 and so on. Returns a copy of `reply`, because the number of `reply` may be
/// one of these numbers.
fn place(fds: &[OwnedFd], reply: &OwnedFd) -> io::Result<OwnedFd> {
    // The numbers of the copies are above all targets, so that dup2(2) overwrites none of them.
    let above = RawFd::try_from(fds.len()).map_err(io::Error::other)?;
    let reply = duplicate_from(reply, above)?;
    let copies = fds.iter().map(|fd| duplicate_from(fd, above)).collect::<io::Result<Vec<_>>>()?;
    for (copy, target) in copies.iter().zip(0..) {
        // SAFETY: this process exists only for the program, and uses no fd that is overwritten.
        unsafe { copy_to(copy, target) }?;
    }
    Ok(reply)
}
