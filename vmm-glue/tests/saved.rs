//! Saves a VM, and restores it in another VMM process, several times. The guest is machine code without a kernel that
//! counts on the console. With the paths of a kernel and an initrd as arguments, the guest is Husk's guest, and the
//! program connects to its agent.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failure of the test"
)]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use husk_vmm::client::{ARGV0, CONTROL_FD, CallError, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{BuildId, FdIndex, RateLimit, SeccompMode, Source, VmConfig};
use husk_vmm::control::{Answer, BootStep, Call, Notice};
use husk_vmm::snapshot::state::State;
use husk_vmm::snapshot::touched::Range;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// How long the process may take for each answer.
const LIMIT: Duration = Duration::from_secs(1800);
/// The agent's port (`husk_proto::ports::AGENT`).
const AGENT: u32 = 1024;
const BUILD: BuildId = [3; 32];
/// Address of the program.
const PROGRAM: u64 = 0x20_0000;
/// Address of the number that the program counts.
const COUNTER: u64 = 0x30_0000;
/// The program, in 64-bit mode: prints the letters a to p and a newline each, over and over.
const CODE: [u8; 37] = [
    0x31, 0xdb, // xor ebx, ebx
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0x89, 0xd8, // next: mov eax, ebx
    0x24, 0x0f, // and al, 15
    0x04, 0x61, // add al, 'a'
    0xee, // out dx, al
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
    0xff, 0xc3, // inc ebx
    0xb9, 0x00, 0x20, 0x00, 0x00, // mov ecx, 0x2000
    0xff, 0xc9, // wait: dec ecx
    0x75, 0xfc, // jnz wait
    0x89, 0x1c, 0x25, 0x00, 0x00, 0x30, 0x00, // mov [0x300000], ebx
    0xeb, 0xe2, // jmp next
];

fn main() {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        // SAFETY: `spawn` passes the control socket as this fd, and nothing else owns the fd.
        husk_vmm::process::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    }
    let files: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    match files.as_slice() {
        [kernel, initrd] => agent(kernel, initrd),
        _ => counter(),
    }
}

/// Saves Husk's guest when its agent is ready. Connects to the agent of each restored guest.
fn agent(kernel: &str, initrd: &str) {
    let (state, memory) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let (kernel, initrd) = (File::open(kernel).expect("open the kernel"), File::open(initrd).expect("open the initrd"));
    let begin = Instant::now();
    let mut first = Machine::create([&kernel, &initrd], None, true).unwrap();
    first.vmm.call(Call::Resume, &[]).unwrap();
    loop {
        match first.vmm.notice() {
            Ok(Notice::BootStep { step: BootStep::AgentReady, .. }) => break,
            Ok(Notice::BootStep { .. }) => {}
            other => panic!("{other:?}\n{}", io::read_to_string(first.console).unwrap_or_default()),
        }
    }
    println!("the agent was ready after {:.3} s", begin.elapsed().as_secs_f64());
    let files = [state.reopen().unwrap(), memory.reopen().unwrap()];
    let begin = Instant::now();
    first.vmm.call(Call::Pause, &[]).unwrap();
    first.vmm.call(Call::Save { build: BUILD }, &[files[0].as_fd(), files[1].as_fd()]).expect("save the VM");
    let len = |file: &File| file.metadata().unwrap().len();
    println!(
        "saved in {:.3} s: {} bytes of state, {:.1} MiB of memory",
        begin.elapsed().as_secs_f64(),
        len(&files[0]),
        len(&files[1]) as f64 / 1048576.0
    );
    first.vmm.call(Call::Stop, &[]).unwrap();
    for _ in 0..5 {
        let files = [File::open(state.path()).unwrap(), File::open(memory.path()).unwrap()];
        let begin = Instant::now();
        let mut machine = Machine::create([&kernel, &initrd], Some((&files, BUILD)), false).expect("restore the VM");
        assert_eq!(machine.refused, None);
        let created = begin.elapsed();
        machine.vmm.call(Call::Resume, &[]).unwrap();
        let _agent = machine.vmm.connect(AGENT).expect("connect to the agent");
        println!(
            "restored in {:.3} s, connected to the agent after {:.3} s",
            created.as_secs_f64(),
            begin.elapsed().as_secs_f64()
        );
        machine.vmm.call(Call::Stop, &[]).unwrap();
    }
}

/// Saves a guest that counts, and checks that each restored guest goes on counting.
fn counter() {
    let (state, memory) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let kernel = elf();
    let mut initrd = tempfile::tempfile().unwrap();
    initrd.write_all(b"none").unwrap();
    let mut first = Machine::create([&kernel, &initrd], None, true).unwrap();
    first.vmm.call(Call::Resume, &[]).unwrap();
    let mut last = first.line();
    for _ in 0..3 {
        last = follows(last, first.line());
    }
    first.vmm.call(Call::Pause, &[]).unwrap();
    let copy = tempfile::tempfile().unwrap();
    let pagemap = File::open(format!("/proc/{}/pagemap", first.pid)).unwrap();
    first.vmm.call(Call::RecordTouched, &[copy.as_fd(), pagemap.as_fd()]).expect("record what the guest touches");
    first.vmm.call(Call::Resume, &[]).unwrap();
    for _ in 0..2 {
        last = follows(last, first.line());
    }
    let files = [state.reopen().unwrap(), memory.reopen().unwrap()];
    let save = |vmm: &mut Vmm| vmm.call(Call::Save { build: BUILD }, &[files[0].as_fd(), files[1].as_fd()]);
    assert!(matches!(save(&mut first.vmm), Err(CallError::Refused(_))), "a running VM was saved");
    first.vmm.call(Call::Pause, &[]).unwrap();
    save(&mut first.vmm).expect("save the VM");
    let touched = State::from_bytes(&BUILD, &fs::read(state.path()).unwrap()).unwrap().touched;
    let has =
        |ranges: &[Range], page| ranges.iter().any(|range| (range.address..range.address + range.len).contains(&page));
    assert!(has(&touched.written, COUNTER) && !has(&touched.read, COUNTER), "{touched:?}");
    assert!(has(&touched.read, PROGRAM) && !has(&touched.written, PROGRAM), "{touched:?}");
    first.vmm.call(Call::Stop, &[]).unwrap();
    // The lines that were printed before the pause.
    while let Some(line) = first.last_line() {
        last = follows(last, line);
    }
    let restore = |build, state: &Path, memory: &Path| {
        let files = [File::open(state).unwrap(), File::open(memory).unwrap()];
        Machine::create([&kernel, &initrd], Some((&files, build)), false).expect("restore the VM")
    };
    for _ in 0..3 {
        let mut machine = restore(BUILD, state.path(), memory.path());
        assert_eq!(machine.refused, None);
        machine.vmm.call(Call::Resume, &[]).unwrap();
        let mut line = last;
        for _ in 0..20 {
            line = follows(line, machine.line());
        }
        machine.vmm.call(Call::Stop, &[]).unwrap();
    }
    // A saved VM that cannot go on is not used. The kernel boots instead.
    let mut damaged = fs::read(state.path()).unwrap();
    damaged[1000] ^= 1;
    let changed = [tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap()];
    fs::write(changed[0].path(), damaged).unwrap();
    for (build, state, memory, expected) in [
        ([4; 32], state.path(), memory.path(), "another build"),
        (BUILD, changed[0].path(), memory.path(), "a checksum is wrong"),
        (BUILD, state.path(), changed[1].path(), "does not belong to its state"),
    ] {
        let mut machine = restore(build, state, memory);
        let refused = machine.refused.take().unwrap_or_default();
        assert!(refused.contains(expected), "{refused}");
        machine.vmm.call(Call::Resume, &[]).unwrap();
        assert_eq!(machine.line(), b'a');
        machine.vmm.call(Call::Stop, &[]).unwrap();
    }
    println!("a saved VM goes on where it was");
}

/// Checks that a line is the one after `last`.
fn follows(last: u8, line: u8) -> u8 {
    assert_eq!(line, b'a' + (last - b'a' + 1) % 16, "the line {:?} follows {:?}", line as char, last as char);
    line
}

/// A VMM process.
struct Machine {
    vmm: Vmm,
    /// The VMM's PID.
    pid: u32,
    console: BufReader<PipeReader>,
    /// Why the saved VM does not go on.
    refused: Option<String>,
}

impl Machine {
    /// Creates a VM from a kernel and an initrd, or from a saved VM.
    fn create(files: [&File; 2], saved: Option<(&[File; 2], BuildId)>, saveable: bool) -> Result<Self, CallError> {
        let (console, writer) = io::pipe().unwrap();
        let spawned = spawn(SpawnOptions::default()).expect("start the VMM");
        let limit = TimeVal::new(LIMIT.as_secs().cast_signed(), 0);
        setsockopt(&spawned.control.as_fd(), sockopt::ReceiveTimeout, &limit).unwrap();
        let (mut vmm, pid) = (Vmm::new(spawned.control), spawned.pid);
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("open /dev/kvm: this test needs KVM");
        let config = VmConfig {
            id: "saved".to_owned(),
            vcpus: 1,
            max_vcpus: 2,
            memory_mib: 256,
            max_memory_mib: 512,
            huge_mib: 0,
            kvm: FdIndex(0),
            source: match saved {
                None => Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
                Some((_, build)) => Source::Saved {
                    state: FdIndex(4),
                    memory: FdIndex(5),
                    build,
                    kernel: FdIndex(1),
                    initrd: FdIndex(2),
                },
            },
            kernel_params: String::new(),
            console: FdIndex(3),
            share: None,
            require_landlock: false,
            vsock_cid: 3,
            vsock_rate_limit: RateLimit::default(),
            net: Vec::new(),
            blk: Vec::new(),
            balloon: true,
            spare_slots: 2,
            saveable,
            seccomp: SeccompMode::Enforce,
        };
        let mut fds = vec![kvm.as_fd(), files[0].as_fd(), files[1].as_fd(), writer.as_fd()];
        fds.extend(saved.iter().flat_map(|(files, _)| files.iter()).map(AsFd::as_fd));
        match vmm.call(Call::Create(Box::new(config)), &fds)? {
            Answer::Created { refused, .. } => Ok(Self { vmm, pid, console: BufReader::new(console), refused }),
            other => panic!("{other:?}"),
        }
    }

    fn line(&mut self) -> u8 {
        self.last_line().expect("the guest must print a line")
    }

    /// Returns the next line, or `None` if the VMM has ended.
    fn last_line(&mut self) -> Option<u8> {
        let mut line = String::new();
        self.console.read_line(&mut line).unwrap();
        line.bytes().next()
    }
}

/// Returns an ELF file with the program.
fn elf() -> File {
    const OFFSET: u64 = 4096;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, and six sizes and counts.
    file.extend([2u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1u32.to_le_bytes());
    file.extend([PROGRAM, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    // p_type and p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
    file.extend([1u32, 7].map(u32::to_le_bytes).concat());
    let len = CODE.len() as u64;
    file.extend([OFFSET, PROGRAM, PROGRAM, len, len, 4096].map(u64::to_le_bytes).concat());
    file.resize(OFFSET as usize, 0);
    file.extend(CODE);
    let mut elf = tempfile::tempfile().unwrap();
    elf.write_all(&file).unwrap();
    elf
}
