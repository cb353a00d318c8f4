//! Fuzzes accesses to the registers of the serial port that the VMM emulates. Then the shim's code splits the console's
//! output into log lines.

use std::os::fd::OwnedFd;

use husk_shim::vm::console::{LogTail, read_lines};
use husk_vmm::serial::Console;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::input;
use crate::runtime::block_on;

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    Print(Vec<u8>),
    Write(u8, u8),
    Read(u8),
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(steps) = input::<Vec<Step>>(bytes) else { return };
    let (mut reader, writer) = std::io::pipe().expect("create a pipe");
    let irq = EventFd::new(EFD_NONBLOCK).expect("create an eventfd");
    let console = Console::new(OwnedFd::from(writer), irq).expect("create the console");
    for step in steps.iter().take(64) {
        match step {
            Step::Print(text) => text.iter().for_each(|byte| console.write(0, *byte)),
            Step::Write(register, value) => console.write(register % 8, *value),
            Step::Read(register) => drop(console.read(register % 8)),
        }
    }
    console.flush();
    drop(console);
    let mut output = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut output).expect("read the console's output");
    let tail = LogTail::default();
    block_on(read_lines(&output[..], |line| {
        assert!(line.len() <= 3 * 1024, "a log line has {} bytes, but at most 3072 are allowed", line.len());
        assert!(
            !line.chars().any(|char| char.is_control() && char != '\t'),
            "a log line has a control character other than a tab"
        );
        tail.push(line);
    }));
    let _ = tail.console_tail();
}
