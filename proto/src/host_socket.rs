//! Connections from a container to a Unix socket of the node.
//!
//! The agent sends an event that names the socket and a token. The shim connects a stream ([`crate::stream`]) with this
//! token, and writes a one-byte reply: 0 if it has connected, otherwise the errno of connect(2). After the reply, the
//! stream carries the data. A half-close means end of file. When the client has gone, the agent shuts down its receive
//! direction (`husk_base::relay`).

/// Maximum number of connections of a pod at the same time.
pub const MAX_CONNECTIONS: usize = 64;
/// Maximum length of the socket's path below its volume, in bytes.
pub const MAX_PATH: usize = 2048;
/// Maximum number of supplementary groups of the process that connects. Linux allows 65536, but the shim keeps the groups
/// of all requests in memory.
pub const MAX_GROUPS: usize = 1024;

/// EIO, which stands for an errno that is not a byte.
const EIO: u8 = 5;

/// Returns an errno as a reply.
pub fn reply(errno: i32) -> u8 {
    u8::try_from(errno).unwrap_or(EIO)
}
