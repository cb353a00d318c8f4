//! The VMM process from `main` to its end. The process ends when the guest or the shim ends, or when the control socket
//! is closed. After SIGTERM or SIGINT, the process leaves it to the shim to end the pod in an orderly way.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use husk_base::error::chain;
use husk_base::failpoint;
use husk_base::sys::process::exit_immediately;

use crate::boot::{self, Built};
use crate::config::{BuildId, VmConfig};
use crate::config_check;
use crate::control::{Answer, BootStep, Call, ExitReason, PROTOCOL, Request};
use crate::jail::{self, Entered};
use crate::reporter::Reporter;
use crate::vm::{Vm, VmError};

mod log;
mod memory_fault;
mod pids;
mod prepare;
mod termination;

use pids::Pids;
use termination::Inbox;

pub use prepare::{PrepareError, prepare};

/// Runs the VMM on its control socket and never returns. The process must not have other threads yet.
pub fn main(control: OwnedFd) -> ! {
    let reporter = Arc::new(Reporter::new(control));
    log::init();
    if let Err(mismatch) = check_protocol(std::env::args().nth(1).as_deref()) {
        ::log::error!("{mismatch}");
        reporter.exit(ExitReason::Failed(mismatch));
    }
    #[cfg(feature = "failpoints")]
    husk_base::failpoint::load();
    if let Err(error) = prepare() {
        ::log::error!("{}", chain(&error));
        exit_immediately(1);
    }
    let mut inbox = match Inbox::new(reporter.control()) {
        Ok(inbox) => inbox,
        Err(error) => {
            ::log::error!("failed to watch the control socket and signals: {error}");
            exit_immediately(1);
        }
    };
    reporter.report_boot_step(BootStep::ProcessStarted);
    let mut current_vm = None;
    let mut pids = Pids::default();
    loop {
        match inbox.wait(&reporter).and_then(|()| reporter.receive()) {
            Ok((request, fds)) => serve(&mut current_vm, &mut pids, request, fds, &reporter),
            // The shim has ended or has closed its end of the control socket.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => exit_immediately(0),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => reporter.exit(ExitReason::Failed(chain(&error))),
            Err(error) => {
                ::log::error!("failed to receive from the control socket: {error}");
                exit_immediately(1);
            }
        }
    }
}

/// Compares the shim's version of the control protocol with [`PROTOCOL`].
fn check_protocol(shim: Option<&str>) -> Result<(), String> {
    if shim.and_then(|version| version.parse().ok()) == Some(PROTOCOL) {
        return Ok(());
    }
    Err(format!(
        "the shim has version {} of the VMM's protocol, and the VMM has version {PROTOCOL}: install the shim again, \
         which contains the VMM",
        shim.unwrap_or("0")
    ))
}

/// Serves one request and sends its answer.
fn serve(current_vm: &mut Option<Vm>, pids: &mut Pids, request: Request, fds: Vec<OwnedFd>, reporter: &Arc<Reporter>) {
    let Request { seq, call } = request;
    if let Err(error) = reached(&call) {
        return reporter.answer(seq, Err(error.to_string()));
    }
    let answer = match (call, current_vm.as_mut()) {
        (Call::Stop, _) => {
            reporter.answer(seq, Ok(Answer::Done));
            reporter.exit(ExitReason::Stopped)
        }
        (Call::Create(config), None) => match create(*config, fds, reporter) {
            Ok((vm, created)) => {
                *current_vm = Some(vm);
                reporter.report_boot_step(BootStep::VmCreated);
                Ok(created)
            }
            Err(error) => Err(error),
        },
        // A thread that started before the process entered the jail would have no seccomp filter.
        (Call::AcquirePid, Some(_)) => pids.acquire().map(|pid| Answer::Pid { pid }).map_err(|error| chain(&error)),
        (Call::ReleasePid { pid }, _) => {
            pids.release(pid);
            Ok(Answer::Done)
        }
        (Call::Create(_), Some(_)) => Err("failed to create the VM: this process already has a VM".to_owned()),
        (_, None) => Err("failed to serve the request: the VM has not been created yet".to_owned()),
        (Call::Resume, Some(vm)) => {
            vm.resume();
            Ok(Answer::Done)
        }
        (Call::Pause, Some(vm)) => done(vm.pause()),
        (Call::Connect { port }, Some(vm)) => {
            let failure = move |error: &dyn std::error::Error| {
                Err(format!("failed to connect to guest port {port}: {}", chain(error)))
            };
            let reporter = reporter.clone();
            let connected = move |result: io::Result<()>| {
                reporter.answer(seq, result.map_or_else(|error| failure(&error), |()| Ok(Answer::Connected)));
            };
            match vm.connect(port, fds, Box::new(connected)) {
                Ok(()) => return,
                Err(error) => failure(&error),
            }
        }
        (Call::AttachNet(config), Some(vm)) => attached(vm.attach_net(&config, fds)),
        (Call::StartVhost { mac }, Some(vm)) => done(vm.start_vhost(mac, fds)),
        (Call::AttachBlk(config), Some(vm)) => attached(vm.attach_blk(&config, fds)),
        (Call::FindNet(mac), Some(vm)) => {
            Ok(vm.find_net(mac).map_or(Answer::NotFound, |slot| Answer::Attached { slot }))
        }
        (Call::Detach { slot }, Some(vm)) => done(vm.detach(slot)),
        (Call::HotplugVcpus { count }, Some(vm)) => done(vm.hotplug_vcpus(count)),
        (Call::AttachMem(pages), Some(vm)) => attached(vm.attach_mem(pages)),
        (Call::GetPluggedMemory(pages), Some(vm)) => Ok(Answer::PluggedMemory { plugged_mib: vm.plugged_mib(pages) }),
        (Call::RequestMemory { pages, mib }, Some(vm)) => {
            let reporter = reporter.clone();
            let reached = move |bytes| reporter.answer(seq, Ok(Answer::PluggedMemory { plugged_mib: bytes >> 20 }));
            match vm.request_memory(pages, mib, Box::new(reached)) {
                Ok(()) => return,
                Err(error) => Err(chain(&error)),
            }
        }
        (Call::SetBalloon { mib }, Some(vm)) => done(vm.set_balloon(mib)),
        (Call::RecordTouched, Some(vm)) => record_touched(vm, fds),
        (Call::Save { build }, Some(vm)) => save(vm, fds, &build),
        (Call::Inspect, Some(vm)) => {
            vm.inspect().map(|vcpus| Answer::Inspected { vcpus }).map_err(|error| chain(&error))
        }
    };
    reporter.answer(seq, answer);
}

/// The failpoints of the requests that a pod needs.
fn reached(call: &Call) -> io::Result<()> {
    match call {
        Call::Resume => failpoint!("vmm.resume"),
        Call::Connect { .. } => failpoint!("vmm.connect"),
        Call::AttachNet(_) => failpoint!("vmm.attach-net"),
        Call::AcquirePid => failpoint!("vmm.acquire-pid"),
        _ => Ok(()),
    }
}

fn record_touched(vm: &mut Vm, fds: Vec<OwnedFd>) -> Result<Answer, String> {
    let count = fds.len();
    let [copy, pagemap] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| {
        format!("failed to record touched pages: two files are required, but {count} fds were received")
    })?;
    vm.record_touched(copy.into(), pagemap.into()).map(|()| Answer::Done).map_err(|error| chain(&error))
}

fn save(vm: &Vm, fds: Vec<OwnedFd>, build: &BuildId) -> Result<Answer, String> {
    let count = fds.len();
    let [state, memory] = <[OwnedFd; 2]>::try_from(fds)
        .map_err(|_| format!("failed to save the VM: two files are required, but {count} fds were received"))?;
    vm.save(state.into(), memory.into(), build).map(|()| Answer::Done).map_err(|error| chain(&error))
}

fn done(result: Result<(), VmError>) -> Result<Answer, String> {
    result.map(|()| Answer::Done).map_err(|error| chain(&error))
}

fn attached(result: Result<u32, VmError>) -> Result<Answer, String> {
    result.map(|slot| Answer::Attached { slot }).map_err(|error| chain(&error))
}

/// Confines the process and creates the VM. Also returns the answer.
fn create(config: VmConfig, fds: Vec<OwnedFd>, reporter: &Arc<Reporter>) -> Result<(Vm, Answer), String> {
    failpoint!("vmm.create").map_err(|error| error.to_string())?;
    let mut checked =
        config_check::check(config, fds).map_err(|error| format!("invalid VM configuration: {}", chain(&error)))?;
    let share = checked.config.share.as_mut();
    let root = share.as_ref().map(|share| share.root.as_ref());
    let Entered { belongings, unrestricted } =
        jail::enter(root, checked.config.require_landlock, checked.config.seccomp).map_err(|error| chain(&error))?;
    if let Some(share) = share.filter(|_| !jail::UNJAILED) {
        share.root = "/".to_owned();
    }
    let kind = if checked.config.saveable { jail::Kind::Saver } else { jail::Kind::Control };
    let Built { vm, refused } = boot::build(checked, belongings, reporter).map_err(|error| chain(&error))?;
    failpoint!("vmm.built").map_err(|error| error.to_string())?;
    // Confine this thread last, because the threads that it starts inherit its capabilities.
    jail::confine(kind).map_err(|error| chain(&error))?;
    Ok((vm, Answer::Created { unrestricted, refused: refused.map(|error| chain(&error)) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shim_of_another_version_is_refused() {
        check_protocol(Some(&PROTOCOL.to_string())).unwrap();
        for (version, text) in [(None, "version 0 "), (Some("0"), "version 0 "), (Some("x"), "version x ")] {
            assert!(check_protocol(version).unwrap_err().contains(text));
        }
    }
}
