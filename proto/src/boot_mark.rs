//! Boot marks: bytes with which the agent reports the progress of the guest's boot. The agent writes each boot mark to
//! an I/O port. The VMM records the time of the write and sends a notice to the shim.

/// The I/O port, in a range that no PC device uses.
pub const PORT: u16 = 0x5f0;

/// A boot mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BootMark {
    /// The agent has started as PID 1. This is the first mark.
    AgentStarted = 1,
    /// The agent listens on all its vsock ports.
    AgentReady = 2,
    /// A guest that becomes a template can be saved.
    TemplateReady = 3,
}

impl TryFrom<u8> for BootMark {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        match value {
            1 => Ok(Self::AgentStarted),
            2 => Ok(Self::AgentReady),
            3 => Ok(Self::TemplateReady),
            other => Err(other),
        }
    }
}
