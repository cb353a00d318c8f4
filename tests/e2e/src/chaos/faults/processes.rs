//! Faults of processes: signals to shim, VMM, launcher and containerd.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Armed, Field, Hold};
use crate::chaos::plan::Fault;
use crate::cri::restart;

/// Injects a fault into a process.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    let short = Hold::Short(field.seconds(2.0, 6.0));
    match fault {
        Fault::KillShim => send(field.shim()?, Signal::SIGKILL),
        Fault::TermShim => send(field.shim()?, Signal::SIGTERM),
        Fault::StopShim => stop(field.shim()?, short),
        Fault::KillVmm => send(field.vmm()?, Signal::SIGKILL),
        Fault::TermVmm => send(field.vmm()?, Signal::SIGTERM),
        Fault::StopVmm => stop(field.vmm()?, Hold::Life),
        Fault::KillLauncher => send(field.launcher()?, Signal::SIGKILL),
        Fault::StopLauncher => stop(field.launcher()?, Hold::Life),
        Fault::TermContainerd => {
            restart::stop_containerd();
            Ok(Armed::new(Hold::Short(field.seconds(0.0, 2.0)), restart::start_containerd))
        }
        // The rule is written before the life.
        Fault::Failpoint => Ok(Armed::done()),
        Fault::StopContainerd => stop(restart::containerd_pid().ok_or("no containerd")?, short),
        _ => Err(format!("{fault:?} is no fault of a process")),
    }
}

fn send(pid: i32, signal: Signal) -> Result<Armed, String> {
    kill(Pid::from_raw(pid), signal).map_err(|error| format!("{signal} to {pid}: {error}"))?;
    Ok(Armed::done())
}

fn stop(pid: i32, hold: Hold) -> Result<Armed, String> {
    send(pid, Signal::SIGSTOP)?;
    Ok(Armed::new(hold, move || {
        // The process may have been killed. Its pid is not in use again, because the kernel first assigns all other
        // pids.
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }))
}
