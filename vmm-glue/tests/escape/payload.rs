//! The process in the jail. [`run`] enters the jail, makes one attempt, and answers.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use husk_base::sys::process::exit_immediately;
use husk_vmm::client::CONTROL_FD;
use husk_vmm::control::wire;
use husk_vmm::jail::{self, Belongings, Entered, Kind};
use husk_vmm::process;

use crate::attempts::ATTEMPTS;
use crate::{KINDS, Order, Outcome};

/// What an attempt may use.
pub struct Inside {
    pub belongings: Belongings,
    /// PID of the parent in the host's PID namespace. The parent stands for the shim.
    pub parent: i32,
}

/// Enters the jail as the VMM does, makes the attempt, answers and ends the process.
pub fn run() -> ! {
    // SAFETY: the parent passes the control socket as this fd, and nothing else owns the fd.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    process::prepare().expect("prepare the process");
    let (order, _) = wire::recv::<Order>(&control).expect("receive the order");
    let Entered { belongings, .. } = jail::enter(Some(&order.share), false, order.seccomp).expect("enter the jail");
    let (attempt, kind) = (&ATTEMPTS[order.attempt], KINDS[order.kind]);
    let inside = Inside { belongings, parent: order.parent };
    let make = move || {
        jail::confine(kind).expect("confine the thread");
        let outcome = match (attempt.make)(&inside) {
            Ok(what) => Outcome::Escaped(what),
            Err(error) => Outcome::Failed(error),
        };
        let _ = wire::send(control.as_fd(), &outcome, &[]);
        exit_immediately(0)
    };
    if kind == Kind::Control {
        make();
    }
    std::thread::Builder::new().name(format!("{kind:?}")).spawn(make).expect("start the thread");
    loop {
        std::thread::park();
    }
}
