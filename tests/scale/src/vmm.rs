//! The stand-in for the VMM: the process, the jail and the threads of the real VMM, but no VM.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use husk_proto::ports;
use husk_vmm::config::VmConfig;
use husk_vmm::control::{Answer, BootStep, Call, ExitReason, Notice, Reply, Request, wire};
use husk_vmm::{jail, process};
use nix::time::{ClockId, clock_gettime};

use crate::agent::{self, Guest};

/// Stack size of a thread that only waits.
const STACK: usize = 32 << 10;
/// Number of threads that the real VMM has in addition to the control thread, the device loop, the vCPUs and the
/// workers of virtio-fs: the supervisor of the workers, and the thread that starts threads that wait for locks.
const OTHER_THREADS: usize = 2;

/// An idle thread, which ends when the sender is dropped.
struct Idle {
    tid: u32,
    _hold: Sender<()>,
}

impl Idle {
    fn start(name: &str) -> io::Result<Self> {
        let (send, receive) = channel();
        let (hold, held) = channel::<()>();
        thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
            let _ = send.send(nix::unistd::gettid().as_raw().cast_unsigned());
            // Returns an error when the sender is dropped.
            let _ = held.recv();
        })?;
        Ok(Self { tid: receive.recv().map_err(io::Error::other)?, _hold: hold })
    }
}

/// What the process keeps for its pod.
#[derive(Default)]
struct Pod {
    /// The fds of the configuration: KVM, the console, the taps.
    fds: Vec<OwnedFd>,
    /// The threads that stand for the VMM's own threads.
    threads: Vec<Idle>,
    /// The threads that stand for containers on the host, by id.
    pids: HashMap<u32, Idle>,
    /// Connections to the agent's log.
    logs: Vec<UnixStream>,
    jail: Option<jail::Entered>,
    guest: Arc<Guest>,
}

/// Serves the shim's requests until the shim closes the control socket or stops the VM.
pub fn run(control: OwnedFd) -> io::Result<()> {
    process::prepare().map_err(io::Error::other)?;
    let mut pod = Pod::default();
    report(&control, BootStep::ProcessStarted)?;
    loop {
        let (Request { seq, call }, fds) = match wire::recv(&control) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        // The step that follows the answer.
        let steps: &[BootStep] = match &call {
            Call::Create(_) => &[BootStep::VmCreated],
            Call::Resume => &[BootStep::FirstInstruction, BootStep::AgentStarted, BootStep::AgentReady],
            _ => &[],
        };
        let stops = matches!(call, Call::Stop);
        let result = pod.serve(call, fds).map_err(|error| error.to_string());
        wire::send(&control, &Reply::Answer { seq, result }, &[])?;
        for step in steps {
            report(&control, *step)?;
        }
        if stops {
            return wire::send(&control, &Reply::Notice(Notice::Exited { reason: ExitReason::Stopped }), &[]);
        }
    }
}

/// Tells the shim that the boot has reached a step.
fn report(control: &OwnedFd, step: BootStep) -> io::Result<()> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let at_ns = u64::try_from(now.tv_sec()).unwrap_or_default() * 1_000_000_000
        + u64::try_from(now.tv_nsec()).unwrap_or_default();
    wire::send(control, &Reply::Notice(Notice::BootStep { step, at_ns }), &[])
}

impl Pod {
    fn serve(&mut self, call: Call, fds: Vec<OwnedFd>) -> io::Result<Answer> {
        Ok(match call {
            Call::Create(config) => self.create(&config, fds)?,
            Call::Connect { port } => self.connect(port, fds)?,
            Call::AcquirePid => {
                let idle = Idle::start("husk-task")?;
                let pid = idle.tid;
                self.pids.insert(pid, idle);
                Answer::Pid { pid }
            }
            Call::ReleasePid { pid } => {
                self.pids.remove(&pid);
                Answer::Done
            }
            Call::AttachMem(_) | Call::AttachNet(_) | Call::AttachBlk(_) => {
                self.fds.extend(fds);
                Answer::Attached { slot: 3 }
            }
            Call::FindNet(_) => Answer::NotFound,
            Call::RequestMemory { mib, .. } => Answer::PluggedMemory { plugged_mib: mib },
            Call::GetPluggedMemory(_) => Answer::PluggedMemory { plugged_mib: 0 },
            _ => Answer::Done,
        })
    }

    /// Enters the real jail, and starts as many threads as the real VMM has.
    fn create(&mut self, config: &VmConfig, fds: Vec<OwnedFd>) -> io::Result<Answer> {
        let share = config.share.as_ref();
        let root = share.map(|share| Path::new(&share.root));
        let entered = jail::enter(root, config.require_landlock, config.seccomp).map_err(io::Error::other)?;
        self.fds = fds;
        let workers = share.map_or(0, |share| usize::from(share.workers));
        for number in 0..usize::from(config.vcpus) + workers + OTHER_THREADS {
            self.threads.push(Idle::start(&format!("stand-in-{number}"))?);
        }
        let unrestricted = entered.unrestricted.clone();
        self.jail = Some(entered);
        Ok(Answer::Created { unrestricted, refused: None })
    }

    fn connect(&mut self, port: u32, fds: Vec<OwnedFd>) -> io::Result<Answer> {
        let stream = fds.into_iter().next().ok_or_else(|| io::Error::other("the connection has no socket"))?;
        let stream = UnixStream::from(stream);
        match port {
            ports::AGENT => {
                let guest = Arc::clone(&self.guest);
                // This thread takes the place of the device loop.
                thread::Builder::new().name("agent".into()).spawn(move || {
                    if let Err(error) = agent::serve(stream, &guest)
                        && error.kind() != io::ErrorKind::UnexpectedEof
                    {
                        eprintln!("the stand-in for the agent failed: {error}");
                    }
                })?;
            }
            ports::STREAM => self.guest.add_stream(stream),
            ports::LOG => self.logs.push(stream),
            other => return Err(io::Error::other(format!("nobody listens on port {other}"))),
        }
        Ok(Answer::Connected)
    }
}
