//! Runs each attacker in a separate VM. This module spawns, jails and controls the VMM process as the shim does.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use husk_base::sys::interface;
use husk_vmm::client::{CallError, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{BlkConfig, FdIndex, NetConfig, RateLimit, SeccompMode, ShareConfig, Source, VmConfig};
use husk_vmm::control::{Answer, Call, ExitReason, Notice, PageKind, Request, wire};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;
use nix::unistd::{Pid, dup, dup2_stderr};

use crate::guest::{self, END, Guest, REACTION};
use crate::traffic::Traffic;
use crate::tree::Tree;

/// A VMM that does not answer within this time counts as hung.
const HANG: Duration = Duration::from_secs(60);
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const MEMORY_MIB: u64 = 64;
/// Size of the disk in MiB.
const DISK_MIB: u64 = 8;
pub const TAP: &str = "hostile";
/// Maximum length of the attacker's program.
const MAX_CODE: u64 = 1 << 20;
/// Sequence number of requests whose answers the test ignores.
const UNANSWERED: u64 = 1 << 40;

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The attacker printed its last line. Afterwards, the VMM still answered requests.
    Survived,
    /// The VMM reported the end of the VM and exited.
    Ended(String),
    /// The VMM died without a report.
    Died(String),
    /// The VMM did not react.
    Hung(&'static str),
}

/// The result of an attack.
pub struct Outcome {
    pub end: End,
    /// What the device did with the attack's chains.
    pub reaction: String,
    /// Lines of the VMM's log.
    pub log: Vec<String>,
    pub duration: Duration,
    /// Number of notices that the VMM sent.
    pub notices: usize,
}

/// What the host does during an attack.
#[derive(Clone, Copy, Default)]
pub struct Host {
    /// Called before the vCPUs run.
    pub before: Option<fn(&mut Vmm)>,
    /// Called while the vCPUs run.
    pub during: Option<fn(&mut Vmm)>,
    /// Whether the interface may use vhost-net. If true, the host opens vhost-net for the VMM, and sends frames to the
    /// guest.
    pub vhost: bool,
}

/// The parts of the host that all VMs use.
pub struct Node {
    tree: Tree,
    tap: File,
}

impl Node {
    /// Creates the share and the tap, in new namespaces. The caller needs root.
    pub fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("make namespaces, which needs root");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).expect("set the propagation of mounts");
        let tree = Tree::new();
        let share = tree.share();
        mount(Some(&share), &share, none, MsFlags::MS_BIND, none).expect("mount the share");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(none, &share, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none).expect("set the share's flags");
        let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("open /dev/net/tun");
        interface::set_tap(&tap, TAP, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).expect("create a tap");
        interface::set_flags(TAP, libc::IFF_UP | libc::IFF_RUNNING).expect("bring the tap up");
        Self { tree, tap }
    }

    /// Returns the state of the files outside the share. No guest may change these files.
    pub fn surroundings(&self) -> crate::tree::State {
        self.tree.state().0
    }

    /// Runs the attacker.
    pub fn run(&self, attacker: Guest, host: Host) -> Outcome {
        let begin = Instant::now();
        let mut log = tempfile::tempfile().expect("create the log");
        let (console, writer) = io::pipe().expect("create the console");
        let spawned = with_stderr(&log, || spawn(SpawnOptions::default()).expect("start the VMM process"));
        let mut vmm = Vmm::new(spawned.control);
        setsockopt(&vmm, ReceiveTimeout, &TimeVal::new(HANG.as_secs() as i64, 0)).expect("set a timeout");
        let create = self.create(&mut vmm, attacker.finish(), writer.into(), host.vhost);
        let _traffic = host.vhost.then(Traffic::start);
        let mut reaction = String::new();
        let mut notices = 0;
        let end = create.and_then(|()| {
            call(&mut vmm, Call::AttachMem(PageKind::Ordinary))?;
            send(&vmm, Call::RequestMemory { pages: PageKind::Ordinary, mib: 32 }, &[]);
            if let Some(before) = host.before {
                before(&mut vmm);
            }
            call(&mut vmm, Call::Resume)?;
            if host.vhost {
                give_vhost(&mut vmm)?;
            }
            if let Some(during) = host.during {
                during(&mut vmm);
            }
            reaction = read_console(console)?;
            // The answers show that the vCPUs, the device loop and the worker threads can still pause.
            for request in [Call::Pause, Call::Resume, Call::FindNet(MAC), Call::GetPluggedMemory(PageKind::Ordinary)] {
                call(&mut vmm, request)?;
            }
            check_places(&mut vmm);
            refuse_connections_without_a_socket(&mut vmm);
            notices = vmm.take_notices().len();
            call(&mut vmm, Call::Stop)
        });
        let hung = matches!(end, Err(End::Hung(_)));
        let reason = if hung { None } else { exit_reason(&mut vmm, &mut notices) };
        if hung {
            let _ = kill(Pid::from_raw(spawned.pid.cast_signed()), Signal::SIGKILL);
        }
        let status = husk_base::sys::process::wait(spawned.pid.cast_signed(), 0).expect("wait for the VMM process");
        let status = ExitStatus::from_raw(status.expect("get the status of the VMM process from the wait").1);
        assert!(!status.core_dumped(), "the VMM left a core dump");
        let end = match (end, reason) {
            (Err(End::Hung(what)), _) => End::Hung(what),
            (Ok(()), Some(ExitReason::Stopped)) if status.success() => End::Survived,
            (_, Some(ExitReason::Reset)) if status.success() => End::Ended("the guest reset the VM".to_owned()),
            (_, Some(ExitReason::Failed(why))) if status.code() == Some(1) => End::Ended(why),
            (_, reason) => End::Died(format!("{status}, {reason:?}")),
        };
        log.rewind().expect("rewind the log");
        let log = io::read_to_string(&log).expect("read the log").lines().map(str::to_owned).collect();
        Outcome { end, reaction, log, duration: begin.elapsed(), notices }
    }

    fn create(&self, vmm: &mut Vmm, kernel: File, console: OwnedFd, vhost: bool) -> Result<(), End> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("open /dev/kvm: this test needs KVM");
        let mut initrd = tempfile::tempfile().expect("create the initrd");
        initrd.write_all(b"none").expect("write the initrd");
        let disk = tempfile::tempfile().expect("create the disk");
        disk.set_len(DISK_MIB << 20).expect("set the size of the disk");
        let none = RateLimit::default();
        let config = VmConfig {
            id: "hostile".to_owned(),
            vcpus: 2,
            max_vcpus: 2,
            memory_mib: MEMORY_MIB,
            max_memory_mib: 2 * MEMORY_MIB,
            huge_mib: 0,
            kvm: FdIndex(0),
            source: Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
            kernel_params: String::new(),
            console: FdIndex(3),
            share: Some(ShareConfig {
                tag: "husk".to_owned(),
                root: path(self.tree.share()),
                workers: 2,
                volume_cache_ms: 1000,
                rate_limit: none,
            }),
            require_landlock: false,
            vsock_cid: 3,
            vsock_rate_limit: none,
            net: vec![NetConfig {
                taps: vec![FdIndex(4)],
                vhost,
                mac: MAC,
                mtu: 1500,
                receive_rate_limit: none,
                transmit_rate_limit: none,
            }],
            blk: vec![BlkConfig { file: FdIndex(5), read_only: false, serial: "disk".to_owned(), rate_limit: none }],
            balloon: true,
            spare_slots: 1,
            saveable: false,
            seccomp: SeccompMode::Enforce,
        };
        let fds = [kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), console.as_fd(), self.tap.as_fd(), disk.as_fd()];
        vmm.call(Call::Create(Box::new(config)), &fds)
            .map(drop)
            .map_err(|error| panic!("failed to create the VM: {error}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = umount2(&self.tree.share(), MntFlags::MNT_DETACH);
    }
}

fn path(path: PathBuf) -> String {
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// Calls the VMM. An error means that the VMM has ended or hangs.
fn call(vmm: &mut Vmm, request: Call) -> Result<(), End> {
    vmm.call(request, &[]).map(drop).map_err(|error| match error {
        CallError::Receive(error) if error.kind() == io::ErrorKind::WouldBlock => End::Hung("a request got no answer"),
        error => End::Died(error.to_string()),
    })
}

/// Checks that the VMM says where each vCPU is. The program of the boot vCPU has ended, and the other vCPU has not been
/// started.
fn check_places(vmm: &mut Vmm) {
    let answer = vmm.call(Call::Inspect, &[]).expect("ask where the vCPUs are");
    let Answer::Inspected { vcpus } = &answer else { panic!("unexpected answer: {answer:?}") };
    let places: Vec<_> = vcpus.iter().map(|place| place.expect("a vCPU must stop")).collect();
    let in_program = places.first().is_some_and(|place| (guest::CODE..guest::CODE + MAX_CODE).contains(&place.address));
    assert!(in_program && places.len() == 2, "the vCPUs are at {places:x?}");
}

/// Checks that a request to connect needs exactly one socket.
fn refuse_connections_without_a_socket(vmm: &mut Vmm) {
    let (reader, writer) = io::pipe().expect("create a pipe");
    let (one, other) = UnixStream::pair().expect("create a socket pair");
    for fds in [&[][..], &[writer.as_fd()], &[one.as_fd(), other.as_fd()]] {
        let answer = vmm.call(Call::Connect { port: 1 }, fds);
        assert!(matches!(answer, Err(CallError::Refused(_))), "a request with {} fds: {answer:?}", fds.len());
    }
    drop((writer, one));
    // The poll reports a hang-up only if the VMM has closed its copies.
    for fd in [reader.as_fd(), other.as_fd()] {
        let ended = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(60_000_u16));
        assert_eq!(ended, Ok(1), "the VMM keeps an fd of a request that it has refused");
    }
}

/// Waits until the VMM requests vhost-net, and passes an open `/dev/vhost-net` to the VMM.
fn give_vhost(vmm: &mut Vmm) -> Result<(), End> {
    loop {
        match vmm.notice() {
            Ok(Notice::VhostRequested { mac }) => {
                let path = "/dev/vhost-net";
                let file = File::options().read(true).write(true).open(path).expect("open /dev/vhost-net");
                return vmm
                    .call(Call::StartVhost { mac }, &[file.as_fd()])
                    .map(drop)
                    .map_err(|error| panic!("failed to start vhost-net: {error}"));
            }
            Ok(Notice::Exited { reason }) => return Err(End::Died(format!("{reason:?} before vhost-net started"))),
            Ok(_) => {}
            Err(_) => return Err(End::Hung("the VMM did not request vhost-net")),
        }
    }
}

/// Sends a request whose answer does not matter.
pub fn send(vmm: &Vmm, call: Call, fds: &[BorrowedFd<'_>]) {
    wire::send(vmm, &Request { seq: UNANSWERED, call }, fds).expect("send a request");
}

/// Reads the console until the attacker's last line. Returns the lines that say what the device did.
fn read_console(mut console: io::PipeReader) -> Result<String, End> {
    let mut text = Vec::new();
    let end = format!("\n{END}\n").into_bytes();
    loop {
        let timeout = PollTimeout::try_from(HANG).expect("convert HANG to a timeout of poll");
        let ready = poll(&mut [PollFd::new(console.as_fd(), PollFlags::POLLIN)], timeout).expect("poll the console");
        let mut buffer = [0; 4096];
        match if ready == 0 { Ok(0) } else { console.read(&mut buffer) }.expect("read the console") {
            0 if ready == 0 => return Err(End::Hung("the attacker did not print its last line")),
            0 => return Err(End::Died(String::new())),
            len => text.extend_from_slice(&buffer[..len]),
        }
        // Stop when the text ends with the attacker's last line.
        if text.ends_with(&end) || text == end[1..] {
            let text = String::from_utf8_lossy(&text);
            let reactions =
                text.lines().filter_map(|line| line.strip_prefix(REACTION)).flat_map(|line| line.split(';'));
            let reactions: BTreeSet<_> = reactions.map(str::trim).filter(|reaction| !reaction.is_empty()).collect();
            return Ok(reactions.into_iter().rev().collect::<Vec<_>>().join(", "));
        }
    }
}

/// Returns the reason that the VMM reports before it ends. Counts the other notices.
fn exit_reason(vmm: &mut Vmm, notices: &mut usize) -> Option<ExitReason> {
    loop {
        match vmm.notice() {
            Ok(Notice::Exited { reason }) => return Some(reason),
            Ok(_) => *notices += 1,
            Err(_) => return None,
        }
    }
}

/// Runs a closure while `file` is standard error.
fn with_stderr<T>(file: &File, run: impl FnOnce() -> T) -> T {
    let saved = dup(io::stderr()).expect("save standard error");
    dup2_stderr(file).expect("replace standard error");
    let result = run();
    dup2_stderr(saved).expect("restore standard error");
    result
}

/// Returns the pids of the processes that a VMM left behind.
pub fn leftovers() -> Vec<String> {
    let children = fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()));
    children.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}
