//! The process in the jail. [`run`] enters the jail, makes one attempt, and answers.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use husk_base::sys::process::exit_immediately;
use husk_vmm::client::CONTROL_FD;
use husk_vmm::control::wire;
use husk_vmm::jail::{self, Belongings, Entered, Kind};
use husk_vmm::process;
use nix::sys::resource::{Resource, setrlimit};

use crate::attempts::ATTEMPTS;
use crate::{Order, Outcome};

/// The fd limit (RLIMIT_NOFILE) of the process. The limit of the VMM is higher, and a test with so many fds would take
/// too long.
pub const MAX_FDS: u64 = 1024;

/// What an attempt may use.
pub struct Inside {
    pub belongings: Belongings,
    /// PID of the parent in the host's PID namespace. The parent stands for the shim.
    pub parent: i32,
    /// Device number of a disk of the host.
    pub disk: u64,
}

/// Enters the jail as the VMM does, makes the attempt, answers and ends the process.
pub fn run() -> ! {
    // After a panic of a thread, the process would not end, because the main thread waits for no thread.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        exit_immediately(101)
    }));
    // SAFETY: the parent passes the control socket as this fd, and nothing else owns the fd.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    process::prepare().expect("prepare the process");
    let (order, _) = wire::recv::<Order>(&control).expect("receive the order");
    let Entered { belongings, .. } = jail::enter(Some(&order.share), false, order.seccomp).expect("enter the jail");
    let (attempt, kind) = (&ATTEMPTS[order.attempt], Kind::ALL[order.kind]);
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FDS, MAX_FDS).expect("lower the fd limit");
    let inside = Inside { belongings, parent: order.parent, disk: order.disk };
    let make = move || {
        jail::confine(kind).expect("confine the thread");
        let outcome = match (attempt.make)(&inside) {
            Ok(what) => Outcome::Escaped(what),
            Err(stopped) => Outcome::Stopped(stopped),
        };
        let _ = wire::send(control.as_fd(), &outcome, &[]);
        exit_immediately(0)
    };
    if matches!(kind, Kind::Control | Kind::Saver) {
        // The VMM's main thread also starts threads before its filter is set. At the first thread, glibc installs
        // signal handlers.
        std::thread::spawn(std::thread::park);
        make();
    }
    std::thread::Builder::new().name(format!("{kind:?}")).spawn(make).expect("start the thread");
    loop {
        std::thread::park();
    }
}
