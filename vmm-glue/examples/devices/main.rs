//! Boots a guest that runs only this program, and tests the devices with their Linux drivers.
//!
//! Usage: `devices KERNEL`, with further kernel parameters in `DEVICES_KERNEL_PARAMS`. The same static binary runs as
//! the tester, as the VMM process and as the guest's `/init`.

mod guest;
mod interface;

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use husk_vmm::client::{ARGV0, CONTROL_FD, CallError, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{BlkConfig, FdIndex, NetConfig, RateLimit, SeccompMode, ShareConfig, Source, VmConfig};
use husk_vmm::control::{Call, Notice};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PORT: u32 = 1024;
const MIB: usize = 1 << 20;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VHOST_NET: &str = "/dev/vhost-net";

fn main() -> Result<()> {
    if std::process::id() == 1 {
        return guest::main();
    }
    let mut arguments = std::env::args();
    if arguments.next().as_deref() == Some(ARGV0) {
        // SAFETY: under this name, the program is only started by `spawn`, which has put the control socket at
        // CONTROL_FD. Nothing else owns that fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
    }
    let kernel = arguments.next().ok_or("usage: devices KERNEL")?;
    let share = tempfile::tempdir()?;
    prepare_share(share.path())?;
    let mut vmm = boot(&kernel, share.path())?;

    step("refused connection", || match vmm.connect(9) {
        Err(error) if error.to_string().contains("refused") => Ok(()),
        other => Err(format!("connecting to a port on which nothing listens must be refused: {other:?}").into()),
    })?;
    let data = pattern(64 * MIB);
    step("64 MiB to the guest", || {
        let mut stream = open(&mut vmm, b"s")?;
        stream.write_all(&data)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        check(answer == b"same")
    })?;
    step("64 MiB from the guest", || {
        let mut stream = open(&mut vmm, b"g")?;
        let mut received = Vec::with_capacity(data.len());
        stream.read_to_end(&mut received)?;
        check(received == data)
    })?;
    step("16 MiB in both directions at once", || echo(&open(&mut vmm, b"e")?, &data[..16 * MIB]))?;
    step("200 short connections", || (0..200).try_for_each(|_| echo(&open(&mut vmm, b"e")?, b"a few bytes")))?;
    step("8 connections at once, 4 MiB each, in both directions", || {
        let streams = (0..8).map(|_| open(&mut vmm, b"e")).collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let echoes: Vec<_> = streams
                .iter()
                .map(|stream| scope.spawn(|| echo(stream, &data[..4 * MIB]).map_err(|error| error.to_string())))
                .collect();
            echoes.into_iter().try_for_each(|echo| Ok(echo.join().map_err(|_| "an echo thread panicked")??))
        })
    })?;
    step("a fast connection while another connection is not read", || {
        let mut slow = open(&mut vmm, b"g")?;
        echo(&open(&mut vmm, b"e")?, &data[..MIB])?;
        let mut received = Vec::new();
        slow.read_to_end(&mut received)?;
        check(received == data)
    })?;
    step("100 connections closed during a transfer", || {
        for _ in 0..100 {
            let mut stream = open(&mut vmm, b"g")?;
            stream.read_exact(&mut [0; 1000])?;
        }
        echo(&open(&mut vmm, b"e")?, b"still there")
    })?;
    let listener = std::net::TcpListener::bind((interface::HOST, interface::PORT))?;
    let served = data.clone();
    std::thread::spawn(move || serve_tcp(&listener, &served));
    for test in ["files", "volume", "lookups", "many", "permissions", "locks", "rng", "disk", "tcp", "balloon"] {
        if test == "volume" {
            std::fs::write(share.path().join("late"), "made after the mount")?;
        }
        if test == "balloon" {
            vmm.call(Call::SetBalloon { mib: 64 }, &[])?;
        }
        step(test, || {
            let mut stream = open(&mut vmm, b"t")?;
            stream.write_all(test.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            if answer == "ok" { Ok(()) } else { Err(answer.into()) }
        })?;
        if test == "tcp" && std::fs::exists(VHOST_NET)? {
            step("vhost-net", || start_vhost(&mut vmm))?;
        }
    }
    step("tcp, with 20 pauses", || {
        let mut stream = open(&mut vmm, b"t")?;
        let answer = std::thread::spawn(move || {
            stream.write_all(b"tcp")?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        });
        for _ in 0..20 {
            vmm.call(Call::Pause, &[])?;
            vmm.call(Call::Resume, &[])?;
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        check(answer.join().map_err(|_| "the thread of the TCP test panicked")?? == "ok")
    })?;
    check(std::fs::read(share.path().join("written"))? == data[..MIB])?;
    println!("all steps passed");
    Ok(())
}

/// Answers the VMM's notice that requests vhost-net. The notice arrives before the answer to the call `FindNet`.
fn start_vhost(vmm: &mut Vmm) -> Result<()> {
    vmm.call(Call::FindNet(MAC), &[])?;
    let requests = vmm.take_notices();
    check(requests.iter().filter(|notice| **notice == Notice::VhostRequested { mac: MAC }).count() == 1)?;
    let vhost = File::options().read(true).write(true).open(VHOST_NET)?;
    vmm.call(Call::StartVhost { mac: MAC }, &[vhost.as_fd()])?;
    Ok(())
}

fn step(name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let result = run();
    println!("{:8.1} ms  {name}{}", start.elapsed().as_secs_f64() * 1e3, if result.is_ok() { "" } else { ": FAILED" });
    result
}

fn check(condition: bool) -> Result<()> {
    if condition { Ok(()) } else { Err("the step's result differs from the expected result".into()) }
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

fn echo(stream: &UnixStream, data: &[u8]) -> Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let received = std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            writer.write_all(data)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut received = Vec::with_capacity(data.len());
        reader.read_to_end(&mut received)?;
        writing.join().map_err(|_| "the writer thread panicked")??;
        Ok::<_, Box<dyn Error>>(received)
    })?;
    check(received == data)
}

fn open(vmm: &mut Vmm, command: &[u8]) -> Result<UnixStream> {
    let mut stream = vmm.connect(PORT)?;
    stream.write_all(command)?;
    Ok(stream)
}

/// Receives 16 MiB from each client. If these bytes are equal to the start of `data`, sends the bytes back.
fn serve_tcp(listener: &std::net::TcpListener, data: &[u8]) -> std::io::Result<()> {
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut received = vec![0; 16 * MIB];
        stream.read_exact(&mut received)?;
        if received == data[..16 * MIB] {
            stream.write_all(&received)?;
        }
    }
    Ok(())
}

fn prepare_share(root: &std::path::Path) -> Result<()> {
    std::fs::write(root.join("hello"), pattern(5 * MIB))?;
    std::fs::create_dir(root.join("many"))?;
    for number in 0..1000 {
        std::fs::write(root.join("many").join(number.to_string()), number.to_string())?;
    }
    Ok(())
}

fn boot(kernel: &str, root: &std::path::Path) -> Result<Vmm> {
    let start = Instant::now();
    let spawned = spawn(SpawnOptions::default())?;
    let mut vmm = Vmm::new(spawned.control);
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let kernel = File::open(kernel)?;
    let mut initrd = tempfile::tempfile()?;
    initrd.write_all(&cpio(&std::fs::read("/proc/self/exe")?))?;
    let (console, end) = std::io::pipe()?;
    std::thread::spawn(move || {
        let mut console = console;
        let _ = std::io::copy(&mut console, &mut std::io::stderr());
    });
    let disk = tempfile::tempfile()?;
    disk.set_len(64 * MIB as u64)?;
    let tap = interface::tap()?;
    interface::up(interface::TAP, interface::HOST)?;
    let config = VmConfig {
        id: "devices".into(),
        vcpus: 2,
        max_vcpus: 2,
        memory_mib: 512,
        max_memory_mib: 0,
        huge_mib: 0,
        kvm: FdIndex(0),
        source: Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
        kernel_params: std::env::var("DEVICES_KERNEL_PARAMS").unwrap_or_default(),
        console: FdIndex(3),
        share: Some(ShareConfig {
            tag: "husk".into(),
            root: root.display().to_string(),
            workers: 2,
            volume_cache_ms: 1000,
            rate_limit: RateLimit::default(),
        }),
        require_landlock: false,
        vsock_cid: 3,
        vsock_rate_limit: RateLimit::default(),
        net: vec![NetConfig {
            taps: vec![FdIndex(4)],
            // Use vhost-net if the host has it. vhost-net does not check source MACs, and this example does not need
            // that check.
            vhost: std::fs::exists(VHOST_NET)?,
            mac: MAC,
            mtu: 1400,
            receive_rate_limit: RateLimit::default(),
            transmit_rate_limit: RateLimit::default(),
        }],
        blk: vec![BlkConfig {
            file: FdIndex(5),
            read_only: false,
            serial: "disk-0".into(),
            rate_limit: RateLimit::default(),
        }],
        balloon: true,
        spare_slots: 0,
        saveable: false,
        seccomp: SeccompMode::Enforce,
    };
    let fds = [kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), end.as_fd(), tap.as_fd(), disk.as_fd()];
    vmm.call(Call::Create(Box::new(config)), &fds)?;
    println!("{:8.1} ms  VM created", start.elapsed().as_secs_f64() * 1e3);
    vmm.call(Call::Resume, &[])?;
    // The first call of `connect` waits for the guest's vsock driver. The guest refuses connections until its program
    // listens on the port.
    loop {
        match vmm.connect(PORT) {
            Ok(_) => break,
            Err(CallError::Refused(_)) => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
    println!("{:8.1} ms  guest listens", start.elapsed().as_secs_f64() * 1e3);
    Ok(vmm)
}

/// Name, mode, device number and content of a file.
type Entry<'a> = (&'a str, u32, (u32, u32), &'a [u8]);

/// Returns an initrd with `/init` and `/dev/console`, in newc format.
fn cpio(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let entries: [Entry<'_>; 4] = [
        ("dev", 0o040_755, (0, 0), &[]),
        ("dev/console", 0o020_600, (5, 1), &[]),
        ("init", 0o100_755, (0, 0), init),
        ("TRAILER!!!", 0, (0, 0), &[]),
    ];
    for (inode, (name, mode, (major, minor), data)) in entries.into_iter().enumerate() {
        let fields =
            [inode as u32 + 1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
