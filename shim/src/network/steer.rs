//! Port forwarding on the host: steers TCP connections inside the pod's network namespace to two listeners of the shim.
//!
//! The namespace has no servers, because those of the pod are in the guest. Frames that arrive at an interface are
//! redirected and never reach the namespace's network stack. The only connections are those that host processes open
//! inside the namespace: containerd's port forwarding connects to localhost there.
//!
//! A BPF program at the kernel's socket lookup (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9) selects the listener of the address
//! family, for every destination address and port. The accepted connection has the destination as its local address.
//! This needs no netfilter, and everything disappears when its fds are closed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// The listeners, and the BPF link that steers connections to them.
#[derive(Debug)]
pub struct PortForwarding {
    /// Non-blocking listeners for IPv4, and for IPv6 if the namespace has it.
    pub listeners: Vec<TcpListener>,
    /// The BPF link between the program and the namespace. Closing it ends the steering.
    pub link: OwnedFd,
}

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const FUNC_SK_RELEASE: i32 = 86;
const FUNC_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;
/// Offsets in `struct bpf_sk_lookup`.
const CTX_FAMILY: i16 = 8;
const CTX_PROTOCOL: i16 = 12;

/// Steers the connections of the current network namespace.
///
/// # Errors
/// Among others, if the kernel is older than this program type, or is configured to forbid BPF programs.
pub fn current_namespace() -> io::Result<PortForwarding> {
    let listen = |address: SocketAddr| {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok::<_, io::Error>(listener)
    };
    let mut listeners = vec![listen((Ipv4Addr::LOCALHOST, 0).into())?];
    // The namespace may lack IPv6.
    listeners.extend(listen((Ipv6Addr::LOCALHOST, 0).into()));
    let map = create_map()?;
    for (key, listener) in listeners.iter().enumerate() {
        insert(&map, key, listener)?;
    }
    let program = load(&program(map.as_raw_fd()))?;
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    // struct { prog_fd, target_fd, attach_type, flags }
    let mut attr = [program.as_raw_fd().cast_unsigned(), namespace.as_raw_fd().cast_unsigned(), BPF_SK_LOOKUP, 0];
    // SAFETY: the attributes are the four numbers that BPF_LINK_CREATE reads, and contain no pointers.
    let link = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }?;
    // The link keeps the program alive, and the program keeps the map alive.
    Ok(PortForwarding { listeners, link })
}

fn create_map() -> io::Result<OwnedFd> {
    // struct { map_type, key_size, value_size, max_entries }
    let mut attr = [BPF_MAP_TYPE_SOCKMAP, 4, 8, 2];
    // SAFETY: the attributes are the four numbers that BPF_MAP_CREATE needs, and contain no pointers. The kernel takes
    // missing attributes as zero.
    unsafe { bpf(BPF_MAP_CREATE, &mut attr) }
}

fn insert(map: &OwnedFd, key: usize, socket: &impl AsFd) -> io::Result<()> {
    let (key, value) = (key as u32, socket.as_fd().as_raw_fd() as u64);
    // struct { map_fd, key, value, flags }; map_fd is padded to eight bytes
    let mut attr = [map.as_raw_fd() as u64, (&raw const key).addr() as u64, (&raw const value).addr() as u64, 0];
    // SAFETY: the pointers lead to a key and a value of the sizes that the map was created with; both outlive the call.
    unsafe { command(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attr = [0u64; 9];
    // struct { prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags,
    //          prog_name[16], prog_ifindex, expected_attach_type }
    attr[0] = u64::from(BPF_PROG_TYPE_SK_LOOKUP) | (program.len() as u64) << 32;
    attr[1] = program.as_ptr().addr() as u64;
    attr[2] = license.as_ptr().addr() as u64;
    attr[8] = u64::from(BPF_SK_LOOKUP) << 32;
    // SAFETY: the pointers lead to the program, with its own length, and to the NUL-terminated license; both outlive
    // the call.
    unsafe { bpf(BPF_PROG_LOAD, &mut attr) }
}

/// Encodes one BPF instruction: opcode, registers, offset and immediate value.
fn op(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(src << 4 | dst) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(value.cast_unsigned()) << 32
}

/// Returns the BPF program. A jump offset is the number of instructions to skip.
fn program(map: i32) -> Vec<u64> {
    // linux/bpf_common.h and linux/bpf.h: the opcodes in use.
    const MOV: u8 = 0xbf; // dst = src
    const MOV_VALUE: u8 = 0xb7; // dst = value
    const ADD_VALUE: u8 = 0x07;
    const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
    const STORE_WORD: u8 = 0x62; // *(u32 *)(dst + offset) = value
    const LOAD_MAP: u8 = 0x18; // occupies two instructions
    const JUMP_NOT_EQUAL: u8 = 0x55;
    const JUMP_EQUAL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    vec![
        op(MOV, 6, 1, 0, 0),
        op(LOAD_WORD, 2, 6, CTX_PROTOCOL, 0),
        op(JUMP_NOT_EQUAL, 2, 0, 17, libc::IPPROTO_TCP),
        // The map key is 0 for the IPv4 listener and 1 for the IPv6 listener.
        op(LOAD_WORD, 2, 6, CTX_FAMILY, 0),
        op(STORE_WORD, 10, 0, -4, 0),
        op(JUMP_EQUAL, 2, 0, 1, libc::AF_INET),
        op(STORE_WORD, 10, 0, -4, 1),
        op(LOAD_MAP, 1, BPF_PSEUDO_MAP_FD, 0, map),
        0,
        op(MOV, 2, 10, 0, 0),
        op(ADD_VALUE, 2, 0, 0, -4),
        op(CALL, 0, 0, 0, FUNC_MAP_LOOKUP_ELEM),
        op(JUMP_EQUAL, 0, 0, 7, 0),
        op(MOV, 7, 0, 0, 0),
        op(MOV, 1, 6, 0, 0),
        op(MOV, 2, 7, 0, 0),
        op(MOV_VALUE, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, FUNC_SK_ASSIGN),
        // Releases the reference to the listener in r7.
        op(MOV, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, FUNC_SK_RELEASE),
        op(MOV_VALUE, 0, 0, 0, SK_PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// Runs a bpf(2) command that returns a new fd.
///
/// # Safety
/// The attributes must be those of the command, and all pointers in them must stay valid during the call.
unsafe fn bpf<T>(cmd: libc::c_int, attr: &mut [T]) -> io::Result<OwnedFd> {
    // SAFETY: the caller upholds the contract of `command`; the kernel has just created the fd, and nothing else owns
    // it.
    unsafe { command(cmd, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Runs a bpf(2) command and returns its result.
///
/// # Safety
/// As for [`bpf`].
unsafe fn command<T>(cmd: libc::c_int, attr: &mut [T]) -> io::Result<libc::c_int> {
    // SAFETY: the caller passes attributes that are valid for the command; the size is that of the attributes.
    match unsafe { libc::syscall(libc::SYS_bpf, cmd, attr.as_mut_ptr(), size_of_val(attr)) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as libc::c_int),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_reach_the_intended_instructions() {
        let program = program(3);
        let at = |index: usize| (program[index] & 0xff) as u8;
        let target = |index: usize| index + 1 + ((program[index] >> 16) & 0xffff) as usize;
        // The last two instructions return SK_PASS: the lookup continues.
        let end = program.len() - 2;
        assert_eq!(at(end), 0xb7);
        assert_eq!((at(2), at(12)), (0x55, 0x15));
        for jump in [2, 12] {
            assert_eq!(target(jump), end, "from {jump}");
        }
        // Skips the store of key 1 and reaches LOAD_MAP.
        assert_eq!((at(5), at(target(5))), (0x15, 0x18));
    }
}
