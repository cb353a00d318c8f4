//! Boots a kernel and an initrd: `boot VMLINUX INITRD [--memory MIB] [--vcpus N] [--max-vcpus N] [--max-memory MIB]
//! [--share DIR] [--connect PORT] [--attach DISK] [--params TEXT] [--pause]`. The program copies the guest's console to
//! standard output, and prints boot steps to standard error.
//!
//! With `--connect`, the program opens a vsock connection to the guest's port PORT. The program copies standard input
//! to the connection, and the connection's data to standard output.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use husk_vmm::client::{ARGV0, CONTROL_FD, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{BlkConfig, FdIndex, RateLimit, SeccompMode, ShareConfig, Source, VmConfig};
use husk_vmm::control::{Call, ExitReason, Notice};

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().next().as_deref() == Some(ARGV0) {
        // SAFETY: under this name, the program is only started by `spawn`, which has put the control socket at
        // CONTROL_FD. Nothing else owns that fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    }
    let mut arguments = std::env::args().skip(1);
    let (mut files, mut config, mut port, mut disk, mut pause) = (Vec::new(), config(), None, None, false);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("missing value of option {argument}"));
        match argument.as_str() {
            "--memory" => config.memory_mib = value()?.parse()?,
            "--vcpus" => config.vcpus = value()?.parse()?,
            "--max-vcpus" => config.max_vcpus = value()?.parse()?,
            "--max-memory" => config.max_memory_mib = value()?.parse()?,
            "--params" => config.kernel_params = value()?,
            "--share" => config.share = Some(share(value()?)),
            "--connect" => port = Some(value()?.parse()?),
            "--attach" => disk = Some(File::options().read(true).write(true).open(value()?)?),
            "--pause" => pause = true,
            _ => files.push(File::open(argument)?),
        }
    }
    config.max_vcpus = config.max_vcpus.max(config.vcpus);
    let [kernel, initrd] = files.try_into().map_err(|_| "usage: boot VMLINUX INITRD [options]")?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let (mut console, writer) = io::pipe()?;

    let spawned = spawn(SpawnOptions::default())?;
    let started = now_ms();
    eprintln!("[started the VMM process, pid {}]", spawned.pid);
    let mut vmm = Vmm::new(spawned.control);
    let fds: [BorrowedFd<'_>; 4] = [kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), writer.as_fd()];
    vmm.call(Call::Create(Box::new(config)), &fds)?;
    drop(writer);
    let output = std::thread::spawn(move || io::copy(&mut console, &mut io::stdout()));
    vmm.call(Call::Resume, &[])?;
    if pause {
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(50));
            vmm.call(Call::Pause, &[])?;
            eprintln!("[paused]");
            vmm.call(Call::Resume, &[])?;
        }
    }
    if let Some(disk) = disk {
        let serial = "attached".to_owned();
        let config = BlkConfig { file: FdIndex(0), read_only: false, serial, rate_limit: RateLimit::default() };
        let answer = vmm.call(Call::AttachBlk(config), &[disk.as_fd()])?;
        eprintln!("[attached the disk: {answer:?}]");
    }
    if let Some(port) = port {
        connect_stdio(vmm.connect(port)?)?;
        vmm.call(Call::Stop, &[])?;
    }
    loop {
        match vmm.notice()? {
            Notice::BootStep { step, at_ns } => eprintln!("[{step:?} at {} ms]", at_ns as f64 / 1e6 - started),
            Notice::VhostRequested { .. } => eprintln!("[the VMM requests vhost-net for an interface]"),
            Notice::FdShortage => eprintln!("[the VMM is close to its fd limit: the guest should forget unused files]"),
            Notice::Terminated => eprintln!("[the VMM received SIGTERM or SIGINT]"),
            Notice::Exited { reason } => {
                eprintln!("[exited: {reason:?} at {} ms]", now_ms() - started);
                let _ = output.join();
                return match reason {
                    ExitReason::Reset | ExitReason::Stopped => Ok(()),
                    ExitReason::Failed(why) => Err(why.into()),
                };
            }
        }
    }
}

/// Copies standard input to the socket, and data from the socket to standard output, until the guest closes the
/// connection.
fn connect_stdio(stream: std::os::unix::net::UnixStream) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut writer);
        let _ = writer.shutdown(std::net::Shutdown::Write);
    });
    let mut reader = stream;
    let mut buffer = [0; 64 << 10];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            len => io::stdout().write_all(buffer.get(..len).unwrap_or_default())?,
        }
    }
}

fn config() -> VmConfig {
    VmConfig {
        id: "boot".to_owned(),
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 256,
        max_memory_mib: 0,
        huge_mib: 0,
        kvm: FdIndex(0),
        source: Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
        kernel_params: String::new(),
        console: FdIndex(3),
        share: None,
        require_landlock: false,
        vsock_cid: 3,
        vsock_rate_limit: RateLimit::default(),
        net: Vec::new(),
        blk: Vec::new(),
        balloon: false,
        spare_slots: 2,
        saveable: false,
        seccomp: SeccompMode::Enforce,
    }
}

fn share(root: String) -> ShareConfig {
    ShareConfig { tag: "husk".to_owned(), root, workers: 1, volume_cache_ms: 1000, rate_limit: RateLimit::default() }
}

fn now_ms() -> f64 {
    let now = nix::time::ClockId::CLOCK_MONOTONIC.now().map_or(Duration::ZERO, Duration::from);
    now.as_secs_f64() * 1e3
}
