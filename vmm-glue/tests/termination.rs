//! Sends SIGTERM and SIGINT to a VMM process. The process must report the signal to the shim, and continue to run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a failure of the test")]

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use husk_vmm::client::{ARGV0, CONTROL_FD, CallError, SpawnOptions, Vmm, spawn};
use husk_vmm::control::{BootStep, Call, Notice};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long the process may take for each answer or notice.
const LIMIT: Duration = Duration::from_secs(30);

fn main() {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        // SAFETY: `spawn` passes the control socket as this fd, and nothing else owns the fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let spawned = spawn(SpawnOptions::default()).expect("start the VMM");
        let pid = Pid::from_raw(spawned.pid.cast_signed());
        let limit = TimeVal::new(LIMIT.as_secs().cast_signed(), 0);
        setsockopt(&spawned.control.as_fd(), sockopt::ReceiveTimeout, &limit).unwrap();
        let mut vmm = Vmm::new(spawned.control);
        let notice = vmm.notice().unwrap();
        assert!(matches!(notice, Notice::BootStep { step: BootStep::ProcessStarted, .. }), "{notice:?}");
        kill(pid, signal).unwrap();
        assert_eq!(vmm.notice().expect("the VMM must report the signal"), Notice::Terminated);
        let refused = vmm.call(Call::Pause, &[]);
        assert!(matches!(refused, Err(CallError::Refused(_))), "the VMM must serve requests after {signal}");
        vmm.call(Call::Stop, &[]).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
    }
    println!("the VMM reports SIGTERM and SIGINT, and goes on");
}
