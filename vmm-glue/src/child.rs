//! The VMM process from `main` to its end. It ends with the guest, the shim or the control socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use husk_base::error::chain;

use crate::boot;
use crate::check;
use crate::control::{Answer, Call, ExitReason, Notice, Reply, Request, Step, wire};
use crate::serial::Console;
use crate::vm::{Vm, VmError};

mod log;
mod pids;
mod process;

use pids::Pids;

/// Runs the VMM on its control socket and never returns. The process must not have other threads yet.
pub fn main(control: OwnedFd) -> ! {
    let reporter = Arc::new(Reporter { control, console: OnceLock::new(), ending: AtomicBool::new(false) });
    log::init();
    if let Err(error) = process::prepare() {
        ::log::error!("{}", chain(&error));
        process::end(1);
    }
    reporter.mark(Step::ProcessStarted);
    let mut current_vm = None;
    let mut pids = Pids::default();
    loop {
        match wire::recv::<Request>(&reporter.control) {
            Ok((request, fds)) => serve(&mut current_vm, &mut pids, request, fds, &reporter),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => process::end(0),
            Err(error) => {
                ::log::error!("failed to receive from the control socket: {error}");
                process::end(1);
            }
        }
    }
}

/// Serves one request and sends its answer.
fn serve(current_vm: &mut Option<Vm>, pids: &mut Pids, request: Request, fds: Vec<OwnedFd>, reporter: &Arc<Reporter>) {
    let Request { seq, call } = request;
    let answer = match (call, current_vm.as_mut()) {
        (Call::Stop, _) => {
            reporter.answer(seq, Ok(Answer::Done), None);
            reporter.exit(ExitReason::Stopped)
        }
        (Call::Create(config), None) => match create(*config, fds, reporter) {
            Ok(vm) => {
                *current_vm = Some(vm);
                reporter.mark(Step::VmCreated);
                Ok(Answer::Done)
            }
            Err(error) => Err(error),
        },
        (Call::TakePid, _) => pids.acquire().map(|pid| Answer::Pid { pid }).map_err(|error| chain(&error)),
        (Call::GiveBackPid { pid }, _) => {
            pids.release(pid);
            Ok(Answer::Done)
        }
        (Call::Create(_), Some(_)) => Err("failed to create the VM: it exists already".to_owned()),
        (_, None) => Err("failed to serve the request: the VM has not been created yet".to_owned()),
        (Call::Resume, Some(vm)) => {
            vm.resume();
            Ok(Answer::Done)
        }
        (Call::Pause, Some(vm)) => done(vm.pause()),
        (Call::Connect { port }, Some(vm)) => {
            let reporter = reporter.clone();
            vm.connect(
                port,
                Box::new(move |result| match result {
                    Ok(stream) => reporter.answer(seq, Ok(Answer::Connected), Some(&stream)),
                    Err(error) => {
                        let text = format!("failed to connect to guest port {port}: {}", chain(&error));
                        reporter.answer(seq, Err(text), None);
                    }
                }),
            );
            return;
        }
        (Call::AttachNet(config), Some(vm)) => attached(vm.attach_net(&config, fds)),
        (Call::AttachBlk(config), Some(vm)) => attached(vm.attach_blk(&config, fds)),
        (Call::FindNet(mac), Some(vm)) => {
            Ok(vm.find_net(mac).map_or(Answer::Nowhere, |slot| Answer::Attached { slot }))
        }
        (Call::Detach { slot }, Some(vm)) => done(vm.detach(slot)),
        (Call::Vcpus { count }, Some(vm)) => done(vm.grow_vcpus(count)),
        (Call::AttachMemory(pages), Some(vm)) => attached(vm.attach_mem(pages)),
        (Call::PluggedMemory(pages), Some(vm)) => Ok(Answer::Memory { plugged_mib: vm.plugged_mib(pages) }),
        (Call::Memory { pages, mib }, Some(vm)) => {
            let reporter = reporter.clone();
            let reached = move |bytes| reporter.answer(seq, Ok(Answer::Memory { plugged_mib: bytes >> 20 }), None);
            match vm.request_memory(pages, mib, Box::new(reached)) {
                Ok(()) => return,
                Err(error) => Err(chain(&error)),
            }
        }
        (Call::Balloon { mib }, Some(vm)) => done(vm.balloon(mib)),
    };
    reporter.answer(seq, answer, None);
}

fn done(result: Result<(), VmError>) -> Result<Answer, String> {
    result.map(|()| Answer::Done).map_err(|error| chain(&error))
}

fn attached(result: Result<u32, VmError>) -> Result<Answer, String> {
    result.map(|slot| Answer::Attached { slot }).map_err(|error| chain(&error))
}

fn create(config: crate::config::VmConfig, fds: Vec<OwnedFd>, reporter: &Arc<Reporter>) -> Result<Vm, String> {
    let checked = check::check(config, fds).map_err(|error| format!("invalid VM configuration: {}", chain(&error)))?;
    boot::build(checked, reporter).map_err(|error| chain(&error))
}

/// Sends answers and notices to the shim, from any thread of the process.
pub struct Reporter {
    control: OwnedFd,
    console: OnceLock<Arc<Console>>,
    ending: AtomicBool,
}

impl Reporter {
    /// Reports a boot step.
    pub fn mark(&self, step: Step) {
        self.send(&Reply::Notice(Notice::Mark { step, at_ns: process::monotonic_ns() }), None);
    }

    /// Reports that the guest should forget unused files.
    pub(crate) fn report_many_files(&self) {
        self.send(&Reply::Notice(Notice::ManyFiles), None);
    }

    /// Reports why the VM has ended, and ends the process.
    pub fn exit(&self, reason: ExitReason) -> ! {
        if self.ending.swap(true, Ordering::SeqCst) {
            // Another thread is ending the process already. The first reason is the one that is reported.
            loop {
                std::thread::park();
            }
        }
        if let Some(console) = self.console.get() {
            console.flush();
        }
        let code = i32::from(matches!(reason, ExitReason::Failed(_)));
        self.send(&Reply::Notice(Notice::Exited { reason }), None);
        process::end(code)
    }

    /// Registers the console, whose buffered output is written when the process ends.
    pub(crate) fn flush_at_exit(&self, console: Arc<Console>) {
        // The VM is built once, so the cell is empty.
        let _ = self.console.set(console);
    }

    fn answer(&self, seq: u64, result: Result<Answer, String>, fd: Option<&OwnedFd>) {
        self.send(&Reply::Answer { seq, result }, fd);
    }

    fn send(&self, reply: &Reply, fd: Option<&OwnedFd>) {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = wire::send(&self.control, reply, &fds) {
            // The shim is gone, so the VM has no purpose any more.
            ::log::debug!("failed to send on the control socket: {error}");
            process::end(0);
        }
    }
}
