//! BPF programs, maps and links (bpf(2)).
//!
//! The kernel treats omitted attributes as zero. Each command therefore passes only the attributes that it needs.
//!
//! The attributes of a command are an array of 64-bit words. A word holds one attribute of 64 bits or two of 32 bits.
//! Comments list the attributes by word.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::new_fd;

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;

/// Licence of the programs. The kernel stores the licence with each program.
const LICENSE: &CStr = c"Apache-2.0";

/// `struct bpf_insn`, an instruction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation (BPF_…).
    pub code: u8,
    /// Register numbers: destination in the lower four bits, source in the upper four bits.
    pub registers: u8,
    /// Signed offset of a memory access or a jump.
    pub offset: i16,
    /// Signed immediate constant.
    pub imm: i32,
}

impl Instruction {
    /// Creates an instruction.
    pub const fn new(code: u8, destination: u8, source: u8, offset: i16, imm: i32) -> Self {
        Self { code, registers: source << 4 | destination, offset, imm }
    }
}

/// Loads a program of type `kind` (BPF_PROG_TYPE_…). `attach_type` is the expected attach type (BPF_…), or 0 if
/// programs of this type have no attach type.
///
/// # Errors
/// EACCES or EINVAL if the verifier rejects the program, and the other errors of bpf(2).
pub fn load_program(kind: u32, attach_type: u32, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    // Word 0: prog_type, insn_cnt. 1: insns. 2: license. 3: log_level, log_size. 4: log_buf. 5: kern_version,
    // prog_flags. 6 and 7: prog_name. 8: prog_ifindex, expected_attach_type.
    let mut attributes = [0; 9];
    attributes[0] = pair(kind, count);
    attributes[1] = address(instructions.as_ptr());
    attributes[2] = address(LICENSE.as_ptr());
    attributes[8] = pair(0, attach_type);
    // SAFETY: the kernel reads `count` instructions and the licence, which ends with NUL. Instructions and licence
    // outlive the call. The command returns a new fd or -1.
    unsafe { new_fd(bpf(BPF_PROG_LOAD, &attributes)) }
}

/// Attaches a program to `target`, such as a cgroup, with `flags` (BPF_F_…).
///
/// # Errors
/// The errors of bpf(2).
pub fn attach(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32, flags: u32) -> io::Result<()> {
    // Word 0: target_fd, attach_bpf_fd. 1: attach_type, attach_flags.
    let attributes = [pair(number(target), number(program)), pair(attach_type, flags)];
    // SAFETY: the attributes of BPF_PROG_ATTACH have no pointers.
    match unsafe { bpf(BPF_PROG_ATTACH, &attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Attaches a program to `target`, such as a network namespace, until the returned link is closed (Linux 5.7). The link
/// keeps the program alive.
///
/// # Errors
/// The errors of bpf(2).
pub fn link(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    // Word 0: prog_fd, target_fd. 1: attach_type, flags.
    let attributes = [pair(number(program), number(target)), pair(attach_type, 0)];
    // SAFETY: if a link has no options, the attributes of BPF_LINK_CREATE have no pointers. The command returns a new
    // fd or -1.
    unsafe { new_fd(bpf(BPF_LINK_CREATE, &attributes)) }
}

/// A map from numbers to sockets (BPF_MAP_TYPE_SOCKMAP).
#[derive(Debug)]
pub struct SocketMap(OwnedFd);

impl SocketMap {
    /// Creates an empty map.
    ///
    /// # Errors
    /// The errors of bpf(2).
    pub fn create(max_entries: u32) -> io::Result<Self> {
        // Word 0: map_type, key_size. 1: value_size, max_entries.
        // The sizes are in bytes.
        let (key_size, value_size) = (u32::BITS / 8, u64::BITS / 8);
        let attributes = [pair(BPF_MAP_TYPE_SOCKMAP, key_size), pair(value_size, max_entries)];
        // SAFETY: the attributes of BPF_MAP_CREATE have no pointers. The command returns a new fd or -1.
        unsafe { new_fd(bpf(BPF_MAP_CREATE, &attributes)) }.map(Self)
    }

    /// Creates or replaces the entry `key`. The map does not keep the socket open. When the socket is closed, the
    /// kernel removes the entry.
    ///
    /// # Errors
    /// E2BIG if the key is greater than or equal to `max_entries`, and the other errors of bpf(2).
    pub fn insert(&self, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = u64::from(number(socket));
        // Word 0: map_fd. 1: key. 2: value. 3: flags.
        let attributes = [number(self.0.as_fd()).into(), address(&raw const key), address(&raw const value), 0];
        // SAFETY: the kernel reads a key and a value of the sizes that `create` has set. Both outlive the call.
        match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for SocketMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes the system call bpf(2).
///
/// # Safety
/// Every pointer in the attributes must point to memory that the command may read and that outlives the call.
unsafe fn bpf(command: libc::c_int, attributes: &[u64]) -> libc::c_long {
    // SAFETY: the attributes have the given size, and the caller guarantees that their pointers are valid. The commands
    // of this module read the attributes but do not write to them.
    unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) }
}

/// Encodes two adjacent 32-bit fields as one word. The code assumes little-endian order, because Husk runs only on x86.
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BPF_PROG_TYPE_SOCKET_FILTER, which needs no attach type.
    const SOCKET_FILTER: u32 = 1;
    /// `r0 = 0`
    const MOVE_ZERO: Instruction = Instruction::new(0xb7, 0, 0, 0, 0);
    /// `return r0`
    const EXIT: Instruction = Instruction::new(0x95, 0, 0, 0, 0);

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no bpf")]
    fn verifier_accepts_only_valid_programs() {
        load_program(SOCKET_FILTER, 0, &[MOVE_ZERO, EXIT])
            .expect("this test needs root and bpf(2), because it loads a program");
        assert!(load_program(SOCKET_FILTER, 0, &[MOVE_ZERO]).is_err());
        assert!(load_program(SOCKET_FILTER, 0, &[]).is_err());
    }

    #[test]
    fn fields_are_packed_as_the_kernel_reads_them() {
        assert_eq!(pair(1, 2).to_ne_bytes(), [1, 0, 0, 0, 2, 0, 0, 0]);
    }
}
