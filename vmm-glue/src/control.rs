//! What shim and VMM process say to each other over the control socket.
//!
//! The socket is a `SOCK_SEQPACKET` pair; each packet is one JSON message, with descriptors as `SCM_RIGHTS`.
//! Requests carry a number that the answer repeats; notices carry none and come in the order they happened.

use serde::{Deserialize, Serialize};

use crate::config::{BlkConfig, NetConfig, VmConfig};

pub mod wire;

/// From shim to VMM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Repeated in the answer.
    pub seq: u64,
    /// What to do.
    pub call: Call,
}

/// What the shim asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// Builds the virtual machine; its vCPUs stay paused. Descriptors: those the configuration counts.
    Create(Box<VmConfig>),
    /// Lets the vCPUs run, for the first time or after `Pause`.
    Resume,
    /// Stops the vCPUs and the device loop between two requests; returns when all stand still.
    Pause,
    /// Opens a vsock stream to a port of the guest. The answer carries one connected stream socket; it is held back
    /// until the guest has accepted the connection, or fails when the guest refuses it.
    Connect {
        /// Port in the guest.
        port: u32,
    },
    /// Plugs a network interface into a spare slot.
    AttachNet(NetConfig),
    /// Plugs a disk into a spare slot.
    AttachBlk(BlkConfig),
    /// Asks for the slot of the interface with this address; the answer is `Attached`, or `Nowhere`.
    FindNet([u8; 6]),
    /// Takes a disk or an interface out of its slot and closes it; the agent's Release comes first.
    Detach {
        /// Its slot.
        slot: u32,
    },
    /// Asks the guest for this many MiB back, from the start size; 0 deflates the balloon.
    Balloon {
        /// Target in MiB.
        mib: u64,
    },
    /// Makes vCPUs until there are `count`, at most the configuration's `max_vcpus`; the guest then has to start them.
    /// There are never fewer again.
    Vcpus {
        /// vCPUs in all.
        count: u8,
    },
    /// Plugs in the device that memory comes by, once; the answer is `Attached`, and the same slot any later time.
    AttachMemory(Pages),
    /// Asks the guest to have this many MiB plugged in beside those of the start. The answer, `Memory`, is held back
    /// until it has, or until the next such request.
    Memory {
        /// Of which kind.
        pages: Pages,
        /// MiB, rounded up to a whole block.
        mib: u64,
    },
    /// Asks how much is plugged in now; the answer is `Memory`.
    PluggedMemory(Pages),
    /// Asks for a pid of the host that stands for one container; the answer is `Pid`.
    TakePid,
    /// The container is gone.
    GiveBackPid {
        /// What `TakePid` gave.
        pid: u32,
    },
    /// Ends the process; the guest gets no warning. Where it has disks, the agent's Sync comes first.
    Stop,
}

/// Of what the host makes memory that is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pages {
    /// What it has.
    Ordinary,
    /// Huge pages of its pool.
    Huge,
}

/// From VMM to shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The answer to the request with this number.
    Answer {
        /// The request's number.
        seq: u64,
        /// What came of it; the error is the whole chain of causes, printed.
        result: Result<Answer, String>,
    },
    /// Something happened.
    Notice(Notice),
}

/// A successful answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// There is no such thing.
    Nowhere,
    /// Connected; the packet carries the socket.
    Connected,
    /// So much memory is plugged in.
    Memory {
        /// MiB beside those of the start.
        plugged_mib: u64,
    },
    /// The number of a thread of the VMM's.
    Pid {
        /// As the VMM's own process namespace has it, which is the shim's.
        pid: u32,
    },
    /// Attached in this virtio-mmio slot.
    Attached {
        /// Slot number; `husk_proto::slots::device_name` tells the guest's name of it.
        slot: u32,
    },
}

/// Something the VMM says unasked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// A step of the start, with CLOCK_MONOTONIC in nanoseconds.
    Mark {
        /// Which step.
        step: Step,
        /// When.
        at_ns: u64,
    },
    /// The guest knows of so many files that hardly any more can be opened: it is to forget those it does not use.
    ManyFiles,
    /// The guest is gone; the process ends after this.
    Exited {
        /// Why.
        reason: ExitReason,
    },
}

/// Steps of a start that the VMM sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The process runs `main`.
    ProcessStarted,
    /// Memory, devices and vCPUs exist.
    VmCreated,
    /// Just before the first KVM_RUN.
    FirstInstruction,
    /// The agent's first act as PID 1.
    AgentStarted,
    /// The agent listens.
    AgentReady,
}

/// Why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest reset or powered itself off: orderly, or after a panic that the console tells of.
    Reset,
    /// The shim asked for it.
    Stopped,
    /// KVM could not go on.
    Failed(String),
}

/// An error with all its causes, in one line: what goes into an answer and into the log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // Transparent wrappers repeat what they wrap.
        if !text.ends_with(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}
