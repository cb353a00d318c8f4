//! The kinds of threads of the VMM process.

/// Kind of a thread of the VMM process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread, which serves the control socket.
    Control,
    /// The main thread of a VMM whose VM can be saved. It never runs a pod.
    Saver,
    /// The thread of a vCPU.
    Vcpu,
    /// The device loop.
    DeviceLoop,
    /// A worker thread of the VMM's virtio-fs server.
    FileServer,
    /// The thread that starts worker threads of the virtio-fs server while other worker threads hang. It does not read
    /// guest memory.
    FileSupervisor,
    /// A thread that waits for a lock of a file, or that starts these threads.
    LockWaiter,
    /// A thread that takes the POSIX locks of a process of the guest, or that starts these threads. Its file table has
    /// only files with such locks.
    LockOwner,
    /// The worker thread of a disk.
    Disk,
    /// The thread that faults in guest memory.
    Prefault,
    /// A thread whose id is a container's PID on the host.
    Pid,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Control,
        Self::Saver,
        Self::Vcpu,
        Self::DeviceLoop,
        Self::FileServer,
        Self::FileSupervisor,
        Self::LockWaiter,
        Self::LockOwner,
        Self::Disk,
        Self::Prefault,
        Self::Pid,
    ];

    /// Returns the prefix of the names of this kind's threads (comm in proc(5)).
    pub fn thread_name(self) -> &'static str {
        match self {
            Self::Control | Self::Saver => "husk-vmm",
            Self::Vcpu => "vcpu",
            Self::DeviceLoop => "devices",
            Self::FileServer => "virtio-fs",
            Self::FileSupervisor => "fs-supervisor",
            Self::LockWaiter => "fs-locks",
            Self::LockOwner => "fs-lock-owner",
            Self::Disk => "virtio-blk",
            Self::Prefault => "prefault",
            Self::Pid => "husk-task",
        }
    }
}
