//! Messages between the shim and the VMM process on the control socket.
//!
//! The socket is one end of a `SOCK_SEQPACKET` pair. Each packet is one JSON message. A request can carry fds as
//! `SCM_RIGHTS`. The VMM never sends fds. Otherwise, a guest that has taken over its VMM could give the shim any file,
//! and closing a file can block. A request has a sequence number, which the answer repeats. Notices do not have
//! a sequence number, and are sent in the order of their events.

use serde::{Deserialize, Serialize};

use crate::config::{BlkConfig, BuildId, NetConfig, VmConfig};

pub mod wire;

/// Version of this protocol. A change that an older shim or VMM would misunderstand increases the version. The shim
/// passes its version as the VMM's first argument, because the argument can be read even if the format of the messages
/// differs.
pub const PROTOCOL: u32 = 2;

/// A message from the shim to the VMM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Sequence number, repeated in the answer.
    pub seq: u64,
    /// The operation.
    pub call: Call,
}

/// An operation that the shim requests.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// Creates the VM. Its vCPUs stay paused. The packet carries the fds to which the configuration refers. The answer
    /// is `Created`.
    Create(Box<VmConfig>),
    /// Starts the vCPUs, or resumes them after `Pause`.
    Resume,
    /// Stops the vCPUs, and stops the device loop when it has served its current event. The answer is sent when the
    /// vCPUs and the device loop have stopped.
    Pause,
    /// Opens a vsock connection to a port in the guest. The packet carries one end of a pair of stream sockets. The VMM
    /// copies data between this socket and the guest. The answer is `Connected` when the guest has accepted the
    /// connection. If the guest refuses the connection, the answer is an error, and the VMM closes the socket.
    Connect {
        /// Port in the guest.
        port: u32,
    },
    /// Hot-plugs a network interface into a spare slot.
    AttachNet(NetConfig),
    /// Moves an interface's data path to vhost-net. The VMM requests this with [`Notice::VhostRequested`]. The packet
    /// carries open fds of `/dev/vhost-net`, one for each queue pair.
    StartVhost {
        /// The interface's MAC address.
        mac: [u8; 6],
    },
    /// Hot-plugs a disk into a spare slot.
    AttachBlk(BlkConfig),
    /// Requests the slot of the interface with this MAC address. The answer is `Attached`, or `NotFound` if no
    /// interface has this address.
    FindNet([u8; 6]),
    /// Hot-unplugs a disk or an interface and closes its fds. Call the agent's UnbindDevice first.
    Detach {
        /// Number of the device's slot.
        slot: u32,
    },
    /// Sets the balloon's target, which is the number of MiB that the guest should give back to the host. A target of 0
    /// deflates the balloon.
    SetBalloon {
        /// Target in MiB.
        mib: u64,
    },
    /// Hot-plugs vCPUs until the VM has `count` vCPUs, at most the configuration's `max_vcpus`. The guest then has to
    /// bring the new vCPUs online. vCPUs are never removed.
    HotplugVcpus {
        /// Total number of vCPUs.
        count: u8,
    },
    /// Hot-plugs the virtio-mem device. The answer is `Attached` with the device's slot, even if the device was already
    /// attached.
    AttachMem(PageKind),
    /// Sets the amount of memory that the guest should plug in addition to the memory at boot. The answer is
    /// `PluggedMemory`. The answer is sent when the guest has reached this amount, or when the next `RequestMemory` for
    /// the same kind of pages arrives.
    RequestMemory {
        /// Kind of memory.
        pages: PageKind,
        /// Size in MiB, rounded up to a whole block.
        mib: u64,
    },
    /// Requests the amount of plugged memory. The answer is `PluggedMemory`.
    GetPluggedMemory(PageKind),
    /// Requests a VMM thread that represents one container on the host. The answer is `Pid`, with the thread's id in
    /// the VMM's PID namespace.
    AcquirePid,
    /// Releases a container's pid.
    ReleasePid {
        /// The pid from the answer to `AcquirePid`.
        pid: u32,
    },
    /// Records from now on which pages the guest touches, for [`Call::Save`]. The VM must be paused, and its configuration
    /// must have `saveable`. The packet carries an empty file for a copy of the memory, and the VMM's
    /// `/proc/PID/pagemap`.
    RecordTouched,
    /// Saves the VM, which must be paused. The packet carries two empty files: for the state, and for the memory.
    Save {
        /// The build of the VMM.
        build: BuildId,
    },
    /// Requests where each vCPU is, to find out why a guest does not answer. The answer is `Inspected`.
    Inspect,
    /// Ends the process without a warning to the guest. If the guest has disks, call the agent's Sync first, so that no
    /// data is lost.
    Stop,
}

impl Call {
    /// Returns the operation's name, for error messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "Create",
            Self::Resume => "Resume",
            Self::Pause => "Pause",
            Self::Connect { .. } => "Connect",
            Self::AttachNet(_) => "AttachNet",
            Self::StartVhost { .. } => "StartVhost",
            Self::AttachBlk(_) => "AttachBlk",
            Self::FindNet(_) => "FindNet",
            Self::Detach { .. } => "Detach",
            Self::SetBalloon { .. } => "SetBalloon",
            Self::HotplugVcpus { .. } => "HotplugVcpus",
            Self::AttachMem(_) => "AttachMem",
            Self::RequestMemory { .. } => "RequestMemory",
            Self::GetPluggedMemory(_) => "GetPluggedMemory",
            Self::AcquirePid => "AcquirePid",
            Self::ReleasePid { .. } => "ReleasePid",
            Self::RecordTouched => "RecordTouched",
            Self::Save { .. } => "Save",
            Self::Inspect => "Inspect",
            Self::Stop => "Stop",
        }
    }
}

/// The kind of host pages that back hot-plugged memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageKind {
    /// Ordinary pages.
    Ordinary,
    /// Huge pages from the host's hugetlb pool.
    Huge,
}

/// A message from the VMM to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The answer to a request.
    Answer {
        /// The request's sequence number.
        seq: u64,
        /// The result. On failure, a string that contains the error message and the messages of its causes.
        result: Result<Answer, String>,
    },
    /// An unsolicited message.
    Notice(Notice),
}

/// A successful answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The operation is complete.
    Done,
    /// The VM has been created.
    Created {
        /// A string that names the restrictions that the VMM's jail lacks, because the host's kernel does not support
        /// these restrictions. `None` if no restriction is missing.
        unrestricted: Option<String>,
        /// Why a saved VM does not go on. The kernel boots instead.
        #[serde(default)]
        refused: Option<String>,
    },
    /// The requested item does not exist.
    NotFound,
    /// The connection is open.
    Connected,
    /// The amount of plugged memory.
    PluggedMemory {
        /// MiB in addition to the memory at boot.
        plugged_mib: u64,
    },
    /// The VMM thread that represents the container on the host.
    Pid {
        /// The thread's id in the VMM's own PID namespace.
        pid: u32,
    },
    /// Where each vCPU is, by the vCPU's number. `None` stands for a vCPU that did not stop within a second.
    Inspected {
        /// The places.
        vcpus: Vec<Option<VcpuPlace>>,
    },
    /// The device is in this virtio-mmio slot.
    Attached {
        /// Slot number. `husk_proto::mmio_slots::device_name` returns the guest's name for the device in this slot.
        slot: u32,
    },
}

/// Where a vCPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuPlace {
    /// Virtual address of the next instruction. An address in the kernel is that in the kernel's image, as if the kernel
    /// had not been moved to a random address.
    pub address: u64,
    /// Whether the vCPU accepts interrupts.
    pub interrupts: bool,
}

/// An unsolicited message from the VMM.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// A boot step.
    BootStep {
        /// The step.
        step: BootStep,
        /// Time of the step: CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// The VMM is close to its fd limit. virtio-fs keeps an fd open for each file that the guest has looked up and not
    /// forgotten. The shim should make the guest forget unused files.
    FdShortage,
    /// An interface has so much traffic that vhost-net should take over its queues. The VMM sends this notice at most
    /// once for each interface. The shim answers with [`Call::StartVhost`], or does not answer.
    VhostRequested {
        /// The interface's MAC address.
        mac: [u8; 6],
    },
    /// The VMM process has received SIGTERM or SIGINT. The shim should end the pod in an orderly way. If the shim does
    /// not, the VMM process ends after a timeout.
    Terminated,
    /// The VM has ended. The VMM process ends after this notice.
    Exited {
        /// The reason.
        reason: ExitReason,
    },
}

/// Boot steps that the VMM observes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootStep {
    /// The VMM process has entered `main`.
    ProcessStarted,
    /// Memory, devices and vCPUs have been created.
    VmCreated,
    /// The boot vCPU is about to enter the guest for the first time.
    FirstInstruction,
    /// The agent has started as PID 1.
    AgentStarted,
    /// The agent listens for connections.
    AgentReady,
    /// A guest that becomes a template can be saved.
    TemplateReady,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest reset or powered off the VM. The cause is an orderly shutdown or a panic. If the guest panicked, the
    /// console output contains the panic message.
    Reset,
    /// The shim sent [`Call::Stop`].
    Stopped,
    /// KVM or the device loop failed, or the guest reported a crash. The text describes the failure.
    Failed(String),
}
