//! Boots the test node in QEMU, and follows its progress until the node is off.

use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Machine, Seat, kvm, rootfs::Node};
use crate::cmd;

/// QEMU's fd for the control pipe.
const CONTROL: i32 = 3;

/// Timeout from power-on until containerd answers. The boot takes seven seconds, but an emulated node sometimes hangs.
const BOOT_TIMEOUT: Duration = Duration::from_secs(150);

/// Number of lines of the console that are shown after a crash. A kernel's crash report has about 60 lines, and several
/// reports may follow each other.
const CONSOLE_TAIL: usize = 160;

/// The node ended, or hung, before its script ended.
#[derive(Debug)]
pub struct Crashed(String);

impl std::fmt::Display for Crashed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Crashed {}

/// Time limits of a node.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Maximum time from power-on to the end of the script.
    pub total: Duration,
    /// Maximum time without output of the script.
    pub quiet: Duration,
}

/// An event of a running node.
enum Event {
    /// A line that the node's init, or the script, wrote to the control port.
    Control(String),
    /// Bytes that the script printed.
    Output(Vec<u8>),
}

/// An event of the script, which [`run`] passes to its caller.
pub enum Progress<'a> {
    /// The text of a line "mark TEXT" on the script's fd 9.
    Mark(&'a str),
    /// Bytes that the script printed, not divided into lines. Output and marks use different pipes, so the order
    /// between output and a mark is not fixed.
    Output(&'a [u8]),
}

/// A node to boot.
pub struct Boot<'a> {
    /// Selects one of the nodes that can run at the same time.
    pub seat: Seat,
    /// Disk, kernel and initramfs.
    pub node: &'a Node,
    /// Whether the node's writes to its disk are kept.
    pub keep: bool,
    /// A tar that the node unpacks over its root file system.
    pub extras: &'a Path,
    /// The disk to which the node writes a tar of `/out`.
    pub out: &'a Path,
    /// The node's size.
    pub machine: Machine,
    /// Further parameters of the kernel's command line.
    pub parameters: &'static str,
}

fn qemu(boot: &Boot, mode: &str) -> Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-no-reboot", "-nodefaults", "-display", "none"]);
    let mut cpus = boot.machine.cpus;
    let accel = match kvm::judge() {
        kvm::Verdict::Usable { rate } => {
            boot.seat.say(format!("the node uses this machine's KVM ({})", kvm::speed(rate)));
            command.args(["-accel", "kvm", "-cpu", "host"]);
            "husk.accel=kvm"
        }
        kvm::Verdict::Not(why) => {
            boot.seat.say(format!("the node is emulated: {why}"));
            // Without "enhanced rep movsb", kernels copy words of eight bytes. In emulation, copying one byte takes as
            // long as copying eight. Without "la57", the page tables of the node and of nested paging have four levels
            // instead of five. Every TLB miss walks both page tables.
            command.args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm,-erms,-fsrm,-la57"]);
            // No program may run on the first CPU. Whenever another CPU restores its FPU's state, QEMU (10.0 and 10.2)
            // clears a flag of the first CPU without an atomic operation: cpu_clear_ignne() in
            // target/i386/tcg/system/fpu_helper.c. The word that QEMU writes back also says whether nested paging is on
            // and whether interrupts are held back (GIF). If a VMRUN or #VMEXIT on the first CPU changes this word at
            // the same moment, that change can be lost.
            cpus += 1;
            // With no_timer_check, the kernel skips its test of the timer interrupt. This test fails on a machine this
            // slow. Without init_on_alloc=0, Debian's kernel would clear every page and object that it allocates.
            "isolcpus=0 no_timer_check init_on_alloc=0 husk.accel=tcg"
        }
    };
    command.arg("-smp").arg(cpus.to_string()).arg("-m").arg(boot.machine.memory.to_string());
    command.arg("-kernel").arg(&boot.node.kernel).arg("-initrd").arg(&boot.node.initrd);
    let disk_options = if boot.keep { "cache=unsafe" } else { "snapshot=on" };
    for (path, options) in
        [(boot.node.disk.as_path(), disk_options), (boot.extras, "readonly=on"), (boot.out, "cache=unsafe")]
    {
        // QEMU ends a value at a comma, unless the comma is doubled.
        let path = path.to_string_lossy().replace(',', ",,");
        command.arg("-drive").arg(format!("file={path},if=virtio,format=raw,{options}"));
    }
    command.args(["-device", "virtio-serial-pci"]);
    command.args(["-chardev", "file,id=control,path=/dev/fd/3", "-device"]);
    command.arg("virtserialport,nr=2,chardev=control,name=husk.control");
    let parameters = boot.parameters;
    command
        .arg("-append")
        // With nokaslr, the addresses in a kernel's crash report match the symbol table.
        .arg(format!(
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable husk.mode={mode} {accel} {parameters}"
        ));
    Ok(command)
}

/// Starts QEMU with the control pipe. QEMU is killed when this process ends.
fn spawn(command: &mut Command) -> Result<(Child, PipeReader)> {
    let (reader, writer) = std::io::pipe().context("failed to create a pipe")?;
    let control = writer.as_raw_fd();
    // SAFETY: between fork and exec, the closure makes only async-signal-safe calls, which take only integers.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if control == CONTROL {
                // dup2 to the same fd does not clear the close-on-exec flag.
                libc::fcntl(control, libc::F_SETFD, 0);
            } else if libc::dup2(control, CONTROL) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn().context("failed to start qemu-system-x86_64; `cargo xtask setup` installs it")?;
    Ok((child, reader))
}

/// Boots the node, runs the script, and returns the script's exit code. If the node ends without an exit code, the
/// error is [`Crashed`]. Passes the script's events to `observe` as they happen.
pub fn run(boot: &Boot, limits: Limits, observe: &mut dyn FnMut(Progress<'_>)) -> Result<u8> {
    let console = boot.seat.console()?;
    let log = console.to_string_lossy().replace(',', ",,");
    let mut command = qemu(boot, "run")?;
    command.args(["-chardev", &format!("file,id=console,path={log}"), "-serial", "chardev:console"]);
    command.args(["-chardev", "file,id=output,path=/dev/stdout", "-device"]);
    command.arg("virtserialport,nr=1,chardev=output,name=husk.output");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let begin = Instant::now();
    let (mut child, control) = spawn(&mut command)?;
    // `command` holds no end of a pipe. Therefore the pipes close when QEMU ends.
    let output = child.stdout.take().context("failed to get QEMU's stdout")?;
    let (sender, events) = channel();
    let show = std::thread::spawn({
        let (sender, seat) = (sender.clone(), boot.seat);
        move || show(seat, output, &sender)
    });
    std::thread::spawn(move || lines(control, &sender));
    let end = follow(boot.seat, &events, begin, limits, observe);
    // After an error, QEMU still runs. QEMU may also still run if the exit code is known, because the node may have
    // failed to power off.
    if !matches!(end, Ok(None)) {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let _ = show.join();
    // If the node was stopped, its last output is still in the channel.
    for event in events.try_iter() {
        if let Event::Output(bytes) = event {
            observe(Progress::Output(&bytes));
        }
    }
    match end {
        Ok(Some(code)) => {
            let secs = begin.elapsed().as_secs_f64();
            boot.seat.say(format!("the node is off after {secs:.1} s; the script's exit code is {code}"));
            Ok(code)
        }
        Ok(None) => Err(crashed(&format!("the node ended before the script did (QEMU ended with {status})"), &console)),
        Err(late) => Err(crashed(&format!("the node was stopped: {late}"), &console)),
    }
}

fn crashed(what: &str, console: &Path) -> anyhow::Error {
    Crashed(format!("{what}; the end of the node's console:\n{}", cmd::tail(console, CONSOLE_TAIL))).into()
}

/// Boots the node with a shell on the terminal.
pub fn shell(boot: &Boot) -> Result<()> {
    boot.seat.say("exit the shell to power the node off; Ctrl-A X stops the node at once");
    let mut command = qemu(boot, "shell")?;
    command.args(["-serial", "mon:stdio", "-chardev", "null,id=output", "-device"]);
    command.arg("virtserialport,nr=1,chardev=output,name=husk.output");
    let (mut child, _control) = spawn(&mut command)?;
    let status = child.wait()?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(())
}

/// Copies the script's output to a file and to the terminal, and sends it as events. If several nodes run, the terminal
/// gets only complete lines, each with the node's number.
fn show(seat: Seat, mut output: impl Read, events: &Sender<Event>) {
    let mut file = seat.log("node-output").ok().and_then(|path| std::fs::File::create(path).ok());
    let label = seat.label();
    let (mut buffer, mut line) = ([0; 8192], Vec::new());
    while let Ok(n @ 1..) = output.read(&mut buffer) {
        let bytes = buffer.get(..n).unwrap_or_default();
        if let Some(file) = &mut file {
            let _ = file.write_all(bytes);
        }
        if label.is_empty() {
            print(&[bytes]);
        } else {
            line.extend_from_slice(bytes);
            let end = line.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let rest = line.split_off(end);
            for text in line.split_inclusive(|byte| *byte == b'\n') {
                print(&[label.as_bytes(), text]);
            }
            line = rest;
        }
        let _ = events.send(Event::Output(bytes.to_vec()));
    }
    if !line.is_empty() {
        print(&[label.as_bytes(), &line, b"\n"]);
    }
}

fn print(parts: &[&[u8]]) {
    let mut stdout = std::io::stdout().lock();
    let _ = parts.iter().try_for_each(|part| stdout.write_all(part)).and_then(|()| stdout.flush());
}

/// Sends the lines of the control port as events.
fn lines(control: PipeReader, events: &Sender<Event>) {
    for line in BufReader::new(control).lines() {
        let Ok(line) = line else { break };
        if events.send(Event::Control(line)).is_err() {
            break;
        }
    }
}

/// Follows the node until it is off. Returns the script's exit code, or `None` if the node did not report it. The error
/// says which time limit was exceeded.
fn follow(
    seat: Seat,
    events: &Receiver<Event>,
    begin: Instant,
    limits: Limits,
    observe: &mut dyn FnMut(Progress<'_>),
) -> Result<Option<u8>, String> {
    let (mut code, mut up, mut last_event) = (None, false, begin);
    loop {
        let total = limits.total.saturating_sub(begin.elapsed());
        let quiet = if up {
            limits.quiet.saturating_sub(last_event.elapsed())
        } else {
            BOOT_TIMEOUT.saturating_sub(begin.elapsed())
        };
        let event = match events.recv_timeout(total.min(quiet)) {
            Ok(event) => event,
            Err(RecvTimeoutError::Disconnected) => return Ok(code),
            // The script has ended, but the node has not powered off.
            Err(RecvTimeoutError::Timeout) if code.is_some() => return Ok(code),
            Err(RecvTimeoutError::Timeout) if total <= quiet => {
                return Err(format!("the script did not end within {} s", limits.total.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) if !up => {
                return Err(format!("containerd did not answer within {} s of power-on", BOOT_TIMEOUT.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("the script printed nothing for {} s", limits.quiet.as_secs()));
            }
        };
        last_event = Instant::now();
        let line = match event {
            Event::Control(line) => line,
            Event::Output(bytes) => {
                observe(Progress::Output(&bytes));
                continue;
            }
        };
        match line.trim().split_once(' ') {
            Some(("exit", number)) => code = Some(number.parse().unwrap_or(125)),
            Some(("containerd", _)) => {
                up = true;
                seat.say(format!("containerd answers, {:.1} s after power-on", begin.elapsed().as_secs_f64()));
            }
            Some(("mark", text)) => observe(Progress::Mark(text)),
            Some(("note", text)) => {
                up = true;
                seat.say(text);
            }
            _ => {}
        }
    }
}
