//! BPF programs, maps and links (bpf(2)).
//!
//! Attributes that a command does not get count as zero, so each command gets only those that it needs.

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

/// Licence of the programs, which the kernel stores with them.
const LICENSE: &CStr = c"Apache-2.0";

/// `struct bpf_insn`, an instruction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation (BPF_…).
    pub code: u8,
    /// Destination in the lower half, source in the upper half.
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

/// Loads a program of type `kind` (BPF_PROG_TYPE_…). `attach_type` is the expected one (BPF_…), or 0 if the type has
/// none.
///
/// # Errors
/// EACCES or EINVAL if the verifier rejects the program, and the other errors of bpf(2).
pub fn load_program(kind: u32, attach_type: u32, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    // prog_type and insn_cnt, insns, license, log_level and log_size, log_buf, kern_version and prog_flags,
    // prog_name[16], prog_ifindex and expected_attach_type
    let mut attributes = [0; 9];
    attributes[0] = pair(kind, count);
    attributes[1] = address(instructions.as_ptr());
    attributes[2] = address(LICENSE.as_ptr());
    attributes[8] = pair(0, attach_type);
    // SAFETY: the kernel reads `count` instructions and the licence, which ends with NUL; all outlive the call. The
    // command returns a new fd or -1.
    unsafe { new_fd(bpf(BPF_PROG_LOAD, &attributes)) }
}

/// Attaches a program to `target`, such as a cgroup, with `flags` (BPF_F_…).
///
/// # Errors
/// Those of bpf(2).
pub fn attach(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32, flags: u32) -> io::Result<()> {
    // target_fd and attach_bpf_fd, attach_type and attach_flags
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
/// Those of bpf(2).
pub fn link(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    // prog_fd and target_fd, attach_type and flags
    let attributes = [pair(number(program), number(target)), pair(attach_type, 0)];
    // SAFETY: the attributes of BPF_LINK_CREATE have no pointers for links without options. The command returns a new
    // fd or -1.
    unsafe { new_fd(bpf(BPF_LINK_CREATE, &attributes)) }
}

/// A map of sockets (BPF_MAP_TYPE_SOCKMAP), by a number.
#[derive(Debug)]
pub struct SocketMap(OwnedFd);

impl SocketMap {
    /// Creates an empty map.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn create(max_entries: u32) -> io::Result<Self> {
        // map_type and key_size, value_size and max_entries
        let (key_size, value_size) = (size_of::<u32>() as u32, size_of::<u64>() as u32);
        let attributes = [pair(BPF_MAP_TYPE_SOCKMAP, key_size), pair(value_size, max_entries)];
        // SAFETY: the attributes of BPF_MAP_CREATE have no pointers. The command returns a new fd or -1.
        unsafe { new_fd(bpf(BPF_MAP_CREATE, &attributes)) }.map(Self)
    }

    /// Creates or replaces the entry `key`. The map does not keep the socket open: closing it removes the entry.
    ///
    /// # Errors
    /// E2BIG if the key is not less than the maximum number of entries, and the other errors of bpf(2).
    pub fn insert(&self, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = u64::from(number(socket));
        // map_fd, key, value, flags
        let attributes = [number(self.0.as_fd()).into(), address(&raw const key), address(&raw const value), 0];
        // SAFETY: the kernel reads a key and a value of the sizes that `create` has set; both outlive the call.
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

/// Makes the system call.
///
/// # Safety
/// Every pointer in the attributes is to memory that the command may read, and that outlives the call.
unsafe fn bpf(command: libc::c_int, attributes: &[u64]) -> libc::c_long {
    // SAFETY: the attributes have the given size, and the caller guarantees what they point to. The commands of this
    // module only read them.
    unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) }
}

/// Encodes two adjacent 32-bit fields. Husk runs on little-endian x86 only.
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
    fn verifier_accepts_only_valid_programs() {
        load_program(SOCKET_FILTER, 0, &[MOVE_ZERO, EXIT])
            .expect("this test needs root and bpf(2): it loads a program");
        assert!(load_program(SOCKET_FILTER, 0, &[MOVE_ZERO]).is_err());
        assert!(load_program(SOCKET_FILTER, 0, &[]).is_err());
    }

    #[test]
    fn fields_are_packed_as_the_kernel_reads_them() {
        assert_eq!(pair(1, 2).to_ne_bytes(), [1, 0, 0, 0, 2, 0, 0, 0]);
    }
}
