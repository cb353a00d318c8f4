//! The typed configuration of one virtual machine, sent by the shim and validated as a whole before anything is made.

use serde::{Deserialize, Serialize};

pub mod check;

/// Everything a virtual machine is made of.
///
/// Files and devices are never named by path: where a device needs one, the configuration holds an [`FdIndex`], the
/// position of the descriptor among those that travel with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Sandbox id, for logs and thread names only.
    pub id: String,
    /// vCPUs to start with, 1 to 64.
    pub vcpus: u8,
    /// vCPUs there may be later, `vcpus` to 64: each costs the guest 0.3 MiB from the start.
    pub max_vcpus: u8,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u64,
    /// Guest memory there may be later, in MiB: only addresses are kept for it. None of it where it is not more.
    pub max_memory_mib: u64,
    /// Huge pages of 2 MiB there may be later, in MiB: only addresses are kept for them. They come in addition, and of
    /// the host's pool.
    pub huge_mib: u64,
    /// `/dev/kvm`, opened read-write.
    pub kvm: FdIndex,
    /// The guest kernel: an uncompressed x86-64 ELF image.
    pub kernel: FdIndex,
    /// The initial RAM file system.
    pub initrd: FdIndex,
    /// Appended to the kernel parameters the VMM sets itself.
    pub kernel_params: String,
    /// Where the guest's serial console is written: the write end of a pipe.
    pub console: FdIndex,
    /// The directory shared over virtio-fs.
    pub share: Option<ShareConfig>,
    /// The guest's vsock address, 3 or more.
    pub vsock_cid: u32,
    /// Network interfaces there at boot.
    pub net: Vec<NetConfig>,
    /// Disks there at boot.
    pub blk: Vec<BlkConfig>,
    /// Balloon with free-page reporting.
    pub balloon: bool,
    /// Empty virtio-mmio slots for disks and interfaces plugged in later, as far as there is room for them. What memory
    /// comes by later has slots of its own.
    pub spare_slots: u8,
}

/// Position of a descriptor in the list passed with the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub usize);

/// A directory shared with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag the guest mounts it by.
    pub tag: String,
    /// Directory on the host, in the mount namespace the VMM process has.
    pub root: String,
    /// Threads that serve requests, 1 or more.
    pub workers: u8,
}

/// A network interface backed by a tap, with a pair of queues for each of the tap's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap: an open `/dev/net/tun` attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. 1 to 8; where there are
    /// several, they are attached with IFF_MULTI_QUEUE to the same interface.
    pub taps: Vec<FdIndex>,
    /// `/dev/vhost-net`, opened with O_PATH, where the host's kernel may carry the frames. It does not look at them: what
    /// is behind the tap has to drop those from another MAC address than the guest's.
    pub vhost: Option<FdIndex>,
    /// The guest's MAC address; frames it sends with another are dropped, by the VMM where that carries them.
    pub mac: [u8; 6],
    /// In bytes, 68 to 65535.
    pub mtu: u16,
}

/// A disk backed by a raw file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The opened file or device.
    pub file: FdIndex,
    /// Refuses writes.
    pub read_only: bool,
    /// Seen in the guest as the disk's serial number, at most 20 bytes.
    pub serial: String,
}
