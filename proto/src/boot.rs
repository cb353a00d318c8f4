//! Boot marks: the guest writes one byte to an I/O port, and the VMM notes the time and tells the shim.

/// The I/O port, in a range no PC device uses.
pub const PORT: u16 = 0x5f0;

/// How far the guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The agent's first act as PID 1.
    AgentStarted = 1,
    /// The agent listens on all its vsock ports.
    AgentReady = 2,
}

impl TryFrom<u8> for Mark {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        match value {
            1 => Ok(Self::AgentStarted),
            2 => Ok(Self::AgentReady),
            other => Err(other),
        }
    }
}
