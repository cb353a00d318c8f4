//! Compiles the device rules of a container to a BPF program, because cgroup v2 has no other device controller.
//!
//! The type of the program is `BPF_PROG_TYPE_CGROUP_DEVICE`. Its context is `struct bpf_cgroup_dev_ctx` of linux/bpf.h.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use husk_base::sys::bpf::{self, Instruction};
use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

const TYPE_BLOCK: i32 = 1;
const TYPE_CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// Device rule. `None` matches any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Rules that runc adds to every container, after the rules of the specification.
const DEFAULTS: &[Rule] = &[
    rule(TYPE_CHAR, None, None, MKNOD),
    rule(TYPE_BLOCK, None, None, MKNOD),
    rule(TYPE_CHAR, Some(1), Some(3), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(1), Some(8), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(1), Some(7), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(5), Some(0), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(1), Some(5), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(1), Some(9), MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(136), None, MKNOD | READ | WRITE),
    rule(TYPE_CHAR, Some(5), Some(2), MKNOD | READ | WRITE),
];

const fn rule(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// Attaches the rules to the cgroup whose directory is `cgroup`. The last rule that matches an access decides. If no
/// rule matches, access is denied.
pub fn attach_rules(cgroup: &Path, rules: &[LinuxDeviceCgroup], devices: &[LinuxDevice]) -> io::Result<()> {
    let named = devices.iter().filter_map(|device| {
        let kind = kind_of(device.typ())?;
        Some(rule(kind, number(Some(device.major())), number(Some(device.minor())), MKNOD | READ | WRITE))
    });
    let all: Vec<Rule> =
        rules.iter().filter_map(from_spec).chain(DEFAULTS.iter().copied()).chain(named.take(64)).collect();
    if allows_all(&all) {
        // A cgroup without a program also allows all access. Without a program, the kernel has less work at each
        // access.
        return Ok(());
    }
    let cgroup = File::open(cgroup)?;
    let program = bpf::load_program(BPF_PROG_TYPE_CGROUP_DEVICE, 0, &compile(&all)?)?;
    bpf::attach(program.as_fd(), cgroup.as_fd(), BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI)
}

/// Whether `rules` allow access to all devices, as the rules of a privileged container do.
pub fn allows_all_devices(rules: &[LinuxDeviceCgroup]) -> bool {
    allows_all(&rules.iter().filter_map(from_spec).collect::<Vec<_>>())
}

/// Whether `rules` allow reading or writing all devices, or all devices of a type.
pub fn allows_device_type(rules: &[LinuxDeviceCgroup]) -> bool {
    let rules: Vec<Rule> = rules.iter().filter_map(from_spec).collect();
    let any = |r: &Rule| r.allow && r.major.is_none() && r.access & (READ | WRITE) != 0;
    let denies_all = |r: &Rule| !r.allow && r.kind.is_none() && r.major.is_none() && r.access == MKNOD | READ | WRITE;
    // Rules before a rule that denies everything have no effect.
    rules.iter().rev().take_while(|r| !denies_all(r)).any(any)
}

fn allows_all(rules: &[Rule]) -> bool {
    let all = |r: &Rule| r.allow && r.kind.is_none() && r.major.is_none() && r.access == MKNOD | READ | WRITE;
    rules.iter().rev().take_while(|r| r.allow).any(all)
}

fn from_spec(spec: &LinuxDeviceCgroup) -> Option<Rule> {
    let mut access = 0;
    for letter in spec.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => 0,
        };
    }
    let kind = match spec.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(kind) => Some(kind_of(kind)?),
    };
    Some(Rule { allow: spec.allow(), kind, major: number(spec.major()), minor: number(spec.minor()), access })
}

fn kind_of(kind: LinuxDeviceType) -> Option<i32> {
    match kind {
        LinuxDeviceType::B => Some(TYPE_BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(TYPE_CHAR),
        _ => None,
    }
}

fn number(value: Option<i64>) -> Option<i32> {
    value.filter(|n| *n >= 0).and_then(|n| i32::try_from(n).ok())
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE_REG: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const AND_IMM: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT_IMM: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const MOVE_IMM: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const JUMP_NE_REG: u8 = 0x5d; // BPF_JMP | BPF_JNE | BPF_X
const JUMP_NE_IMM: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const JUMP_EQ_IMM: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const EXIT: u8 = 0x95;

const fn insn(code: u8, to: u8, from: u8, offset: i16, imm: i32) -> Instruction {
    Instruction::new(code, to, from, offset, imm)
}

/// Compiles the rules. Register r2 holds the device type, r3 the requested access, r4 the major number and r5 the minor
/// number. r1 is a scratch register after the program has read the context.
fn compile(rules: &[Rule]) -> io::Result<Vec<Instruction>> {
    let mut program = vec![
        insn(LOAD_WORD, 3, 1, 0, 0),
        insn(MOVE_REG, 2, 3, 0, 0),
        insn(AND_IMM, 2, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_IMM, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        if let Some(kind) = rule.kind {
            tests.push(insn(JUMP_NE_IMM, 2, 0, 0, kind));
        }
        if rule.access != MKNOD | READ | WRITE {
            tests.push(insn(MOVE_REG, 1, 3, 0, 0));
            tests.push(insn(AND_IMM, 1, 0, 0, rule.access));
            // An allow rule matches only if it has all requested access bits. A deny rule matches if it has any of the
            // requested bits.
            tests.push(match rule.allow {
                true => insn(JUMP_NE_REG, 1, 3, 0, 0),
                false => insn(JUMP_EQ_IMM, 1, 0, 0, 0),
            });
        }
        if let Some(major) = rule.major {
            tests.push(insn(JUMP_NE_IMM, 4, 0, 0, major));
        }
        if let Some(minor) = rule.minor {
            tests.push(insn(JUMP_NE_IMM, 5, 0, 0, minor));
        }
        let verdict = [insn(MOVE_IMM, 0, 0, 0, i32::from(rule.allow)), insn(EXIT, 0, 0, 0, 0)];
        let length = tests.len() + verdict.len();
        let unconditional = tests.is_empty();
        for (index, mut test) in tests.into_iter().enumerate() {
            if matches!(test.code, JUMP_NE_IMM | JUMP_NE_REG | JUMP_EQ_IMM) {
                test.offset = jump_offset(length - index - 1)?;
            }
            program.push(test);
        }
        program.extend(verdict);
        if unconditional {
            // A rule without tests decides every access. The verifier would reject later instructions as unreachable.
            return Ok(program);
        }
    }
    program.extend([insn(MOVE_IMM, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    Ok(program)
}

/// Returns the offset of a jump over `skipped` instructions. Fails if the offset does not fit into 16 bits. With a
/// truncated offset, the program could reach a rule's verdict without the rule's tests.
fn jump_offset(skipped: usize) -> io::Result<i16> {
    i16::try_from(skipped).map_err(|_| {
        let text = format!(
            "failed to compile the device rules: a jump over {skipped} instructions exceeds the maximum of {}",
            i16::MAX
        );
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}

const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets a program as the kernel would.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0i32; 6];
        let mut at = 0usize;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let mut jump = false;
            match i.code {
                LOAD_WORD => r[to] = context[i.offset as usize / 4],
                MOVE_REG => r[to] = r[from],
                AND_IMM => r[to] &= i.imm,
                SHIFT_RIGHT_IMM => r[to] >>= i.imm,
                MOVE_IMM => r[to] = i.imm,
                JUMP_NE_REG => jump = r[to] != r[from],
                JUMP_NE_IMM => jump = r[to] != i.imm,
                JUMP_EQ_IMM => jump = r[to] == i.imm,
                EXIT => return r[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
            at += 1 + if jump { i.offset as usize } else { 0 };
        }
    }

    #[test]
    fn default_rules_allow_only_the_usual_devices() {
        let deny = Rule { allow: false, kind: None, major: None, minor: None, access: MKNOD | READ | WRITE };
        let fuse = rule(TYPE_CHAR, Some(10), Some(229), READ | WRITE);
        let all: Vec<Rule> = [deny, fuse].into_iter().chain(DEFAULTS.iter().copied()).collect();
        let program = compile(&all).unwrap();
        assert!(run(&program, TYPE_CHAR, READ | WRITE, 1, 3));
        assert!(run(&program, TYPE_CHAR, READ, 10, 229));
        assert!(run(&program, TYPE_CHAR, MKNOD, 10, 200));
        assert!(!run(&program, TYPE_CHAR, READ, 10, 200));
        assert!(!run(&program, TYPE_BLOCK, READ, 8, 0));
        assert!(run(&program, TYPE_CHAR, WRITE, 136, 5));
        assert_eq!(program[program.len() - 1].code, EXIT);
    }

    #[test]
    fn jump_offset_rejects_an_offset_that_does_not_fit() {
        assert_eq!(jump_offset(5).unwrap(), 5);
        assert_eq!(jump_offset(32767).unwrap(), i16::MAX);
        assert!(jump_offset(32768).unwrap_err().to_string().contains("a jump over 32768 instructions"));
    }

    #[test]
    fn empty_rules_deny_access() {
        assert!(!run(&compile(&[]).unwrap(), TYPE_CHAR, READ, 1, 3));
    }

    #[test]
    fn deny_of_one_access_bit_denies_combined_access() {
        let allow = Rule { allow: true, kind: None, major: None, minor: None, access: MKNOD | READ | WRITE };
        let deny = Rule { allow: false, kind: Some(TYPE_BLOCK), major: Some(8), minor: None, access: WRITE };
        let program = compile(&[allow, deny]).unwrap();
        assert!(run(&program, TYPE_BLOCK, READ, 8, 1));
        assert!(!run(&program, TYPE_BLOCK, READ | WRITE, 8, 1));
    }
}
