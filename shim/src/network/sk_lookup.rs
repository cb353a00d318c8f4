//! Port forwarding on the host: steers TCP connections in the pod's network namespace to the shim's listeners.
//!
//! Only host processes open connections in the namespace. For example, containerd's port forwarding connects to
//! localhost in the namespace. The namespace has no servers, because the pod's servers run in the guest. Frames that
//! arrive at an interface never reach the namespace's network stack, because tc filters redirect the frames to the tap.
//!
//! A BPF program (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9) selects the listener by the connection's address family. The
//! program ignores the connection's destination address and port. The local address of an accepted connection is the
//! address to which the client connected. Closing the fds in [`PortForwarding`] removes the listeners and the
//! program.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use husk_base::sys::bpf::{self, Instruction, SocketMap};

/// The listeners, and the BPF link that steers connections to the listeners.
#[derive(Debug)]
pub struct PortForwarding {
    /// Non-blocking listeners: one for IPv4, and one for IPv6 if the namespace supports IPv6.
    pub listeners: Vec<TcpListener>,
    /// The BPF link between the program and the namespace. Closing this fd ends the steering.
    pub link: OwnedFd,
}

// linux/bpf.h
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

/// Creates listeners in the current network namespace, and steers TCP connections to these listeners.
///
/// # Errors
/// The kernel's error, for example if the kernel is older than 5.9 or was built without BPF.
pub fn attach_to_current_namespace() -> io::Result<PortForwarding> {
    let listen = |address: SocketAddr| {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok::<_, io::Error>(listener)
    };
    let mut listeners = vec![listen((Ipv4Addr::LOCALHOST, 0).into())?];
    // An error is ignored, because the namespace may not support IPv6.
    listeners.extend(listen((Ipv6Addr::LOCALHOST, 0).into()));
    let map = SocketMap::create(2)?;
    for (key, listener) in (0..).zip(&listeners) {
        map.insert(key, listener.as_fd())?;
    }
    let program = bpf::load_program(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &program(map.as_fd().as_raw_fd()))?;
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    let link = bpf::link(program.as_fd(), namespace.as_fd(), BPF_SK_LOOKUP)?;
    // The link keeps the program alive, and the program keeps the map alive.
    Ok(PortForwarding { listeners, link })
}

/// Returns the BPF program. `map` is the fd of the map that contains the listeners. A jump offset is the number of
/// instructions to skip.
fn program(map: i32) -> Vec<Instruction> {
    // Opcodes from linux/bpf_common.h and linux/bpf.h.
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
        Instruction::new(MOV, 6, 1, 0, 0),
        Instruction::new(LOAD_WORD, 2, 6, CTX_PROTOCOL, 0),
        Instruction::new(JUMP_NOT_EQUAL, 2, 0, 17, libc::IPPROTO_TCP),
        // The map key is 0 for the IPv4 listener and 1 for the IPv6 listener.
        Instruction::new(LOAD_WORD, 2, 6, CTX_FAMILY, 0),
        Instruction::new(STORE_WORD, 10, 0, -4, 0),
        Instruction::new(JUMP_EQUAL, 2, 0, 1, libc::AF_INET),
        Instruction::new(STORE_WORD, 10, 0, -4, 1),
        Instruction::new(LOAD_MAP, 1, BPF_PSEUDO_MAP_FD, 0, map),
        Instruction::new(0, 0, 0, 0, 0),
        Instruction::new(MOV, 2, 10, 0, 0),
        Instruction::new(ADD_VALUE, 2, 0, 0, -4),
        Instruction::new(CALL, 0, 0, 0, FUNC_MAP_LOOKUP_ELEM),
        Instruction::new(JUMP_EQUAL, 0, 0, 7, 0),
        Instruction::new(MOV, 7, 0, 0, 0),
        Instruction::new(MOV, 1, 6, 0, 0),
        Instruction::new(MOV, 2, 7, 0, 0),
        Instruction::new(MOV_VALUE, 3, 0, 0, 0),
        Instruction::new(CALL, 0, 0, 0, FUNC_SK_ASSIGN),
        // Release the reference to the listener's socket. r7 contains the pointer to this socket.
        Instruction::new(MOV, 1, 7, 0, 0),
        Instruction::new(CALL, 0, 0, 0, FUNC_SK_RELEASE),
        Instruction::new(MOV_VALUE, 0, 0, 0, SK_PASS),
        Instruction::new(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_reach_the_intended_instructions() {
        let program = program(3);
        let at = |index: usize| program[index].code;
        let target = |index: usize| index + 1 + usize::try_from(program[index].offset).unwrap();
        // The last two instructions return SK_PASS.
        let end = program.len() - 2;
        assert_eq!(at(end), 0xb7);
        assert_eq!((at(2), at(12)), (0x55, 0x15));
        for jump in [2, 12] {
            assert_eq!(target(jump), end, "the jump at instruction {jump} does not lead to the end");
        }
        // This jump skips the store of key 1 and reaches LOAD_MAP.
        assert_eq!((at(5), at(target(5))), (0x15, 0x18));
    }
}
