//! The typed configuration of one VM. The shim sends the configuration. The VMM validates the whole configuration
//! before it creates anything.

use serde::{Deserialize, Serialize};

/// The complete configuration of a VM.
///
/// The configuration does not contain paths of files and devices, except the root of the share. Instead, it contains an
/// [`FdIndex`] for each file or device: the position of an fd in the list that is sent with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Sandbox id, which is used only in logs and thread names.
    pub id: String,
    /// Number of vCPUs at boot, 1 to 64.
    pub vcpus: u8,
    /// Maximum number of vCPUs, `vcpus` to 64. The guest allocates 0.3 MiB at boot for each possible vCPU.
    pub max_vcpus: u8,
    /// Guest memory at boot in MiB, at least 64.
    pub memory_mib: u64,
    /// Maximum guest memory in MiB, including hot-plugged memory. The VMM reserves only addresses for hot-plugged
    /// memory. A value of at most `memory_mib` means that no memory can be hot-plugged.
    pub max_memory_mib: u64,
    /// Maximum size in MiB of hot-plugged memory that consists of 2 MiB huge pages. `max_memory_mib` does not include
    /// this memory. The VMM reserves only addresses for this memory. The pages come from the host's hugetlb pool.
    pub huge_mib: u64,
    /// `/dev/kvm`, opened read-write.
    pub kvm: FdIndex,
    /// What the VM runs.
    pub source: Source,
    /// Kernel parameters that are appended to the parameters that the VMM sets. A saved VM has those with which it was
    /// booted.
    pub kernel_params: String,
    /// Write end of a pipe, to which the VMM writes the guest's serial console output.
    pub console: FdIndex,
    /// The share, which virtio-fs serves.
    pub share: Option<ShareConfig>,
    /// Whether it is an error if the host's kernel cannot restrict the VMM's access to files with landlock.
    pub require_landlock: bool,
    /// The guest's vsock CID, 3 or more.
    pub vsock_cid: u32,
    /// Rate limit of each direction of vsock.
    pub vsock_rate_limit: RateLimit,
    /// Network interfaces at boot.
    pub net: Vec<NetConfig>,
    /// Disks at boot.
    pub blk: Vec<BlkConfig>,
    /// Whether the VM has a balloon with free page reporting.
    pub balloon: bool,
    /// Number of empty virtio-mmio slots for hot-plugged disks and interfaces. The VM gets fewer empty slots if fewer
    /// slots are free. Hot-plugged memory has additional slots.
    pub spare_slots: u8,
    /// Whether the VM can be saved. It then must not have interfaces or disks. Each vCPU needs one more fd.
    #[serde(default)]
    pub saveable: bool,
    /// What happens when a thread of the VMM makes a system call that its seccomp filter does not allow.
    pub seccomp: SeccompMode,
}

/// What a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A kernel that boots.
    Kernel {
        /// An uncompressed x86-64 ELF image.
        kernel: FdIndex,
        /// The initrd.
        initrd: FdIndex,
    },
    /// A saved VM that goes on. If it cannot go on here, the kernel boots instead. The configuration must have the same
    /// vCPUs, memory, devices and slots as that with which the saved VM was booted, and no interfaces and disks.
    Saved {
        /// The file with the state, opened for reading.
        state: FdIndex,
        /// The file with the memory, opened for reading. The VM shares its pages until it writes to them.
        memory: FdIndex,
        /// Identifies what the VM was booted from, and the build that has saved it.
        build: BuildId,
        /// An uncompressed x86-64 ELF image.
        kernel: FdIndex,
        /// The initrd.
        initrd: FdIndex,
    },
}

/// Identifies what a VM was booted from, and the build of the VMM. A saved VM can only go on in a VMM that names the same
/// id.
pub type BuildId = [u8; 32];

/// What happens when a thread makes a system call that its seccomp filter does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompMode {
    /// The VMM ends, and reports the thread and the call.
    Enforce,
    /// The host's kernel logs the thread and the call, and makes the call. This mode is for finding calls that a filter
    /// lacks.
    Log,
}

/// Position of an fd in the list that is sent with the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub usize);

/// Name of the mount of a root file system that containerd's snapshotter has made for the container.
pub const ROOTFS: &str = "rootfs";
/// Name of the mount of a root file system that is a directory of the host.
pub const HOST_ROOTFS: &str = "host-rootfs";
/// End of the name of an emptyDir's mount.
pub const PRIVATE_SUFFIX: &str = "-private";
/// End of the name of a mount on a local file system of the host. [`PRIVATE_SUFFIX`] can follow.
pub const LOCAL_SUFFIX: &str = "-local";

/// Who changes the files of a mount of the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// A root file system that containerd's snapshotter has made for the container. Only the guest changes it.
    Rootfs,
    /// A root file system that is a directory of the host. Programs of the host can change it.
    HostRootfs,
    /// An emptyDir of the pod. Programs of the host seldom change it.
    EmptyDir,
    /// Another volume. The host and other pods can change it.
    Volume,
}

/// What the name of a mount says about its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountProperties {
    /// Who changes the files.
    pub kind: MountKind,
    /// Whether the file system is local. It then reports no errors when a file is closed.
    pub local: bool,
}

impl MountProperties {
    /// Returns whether the locks of the files stay in the guest's kernel.
    pub fn is_private(self) -> bool {
        self.kind != MountKind::Volume
    }
}

/// Returns what the name of a mount says about its files. A mount of a share has a path of two names, and `name` is the
/// second one. Returns `None` if the shim does not give such names to mounts.
pub fn mount_properties(name: &str) -> Option<MountProperties> {
    match name {
        ROOTFS => return Some(MountProperties { kind: MountKind::Rootfs, local: true }),
        HOST_ROOTFS => return Some(MountProperties { kind: MountKind::HostRootfs, local: true }),
        _ => {}
    }
    let (number, key) = name.split_once('.')?;
    if !number.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let (kind, key) = match key.strip_suffix(PRIVATE_SUFFIX) {
        Some(key) => (MountKind::EmptyDir, key),
        None => (MountKind::Volume, key),
    };
    Some(MountProperties { kind, local: key.ends_with(LOCAL_SUFFIX) })
}

/// Returns whether the locks of a mount's files stay in the guest's kernel. `name` is the name of the mount.
pub fn is_private_mount(name: &str) -> bool {
    mount_properties(name).is_some_and(MountProperties::is_private)
}

/// A mount that belongs to one file system with other mounts of the share ([`joined_mount`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JoinedMount<'a> {
    /// Whether the host allows writes.
    pub writable: bool,
    /// Mounts with the same group are joined. They are on one file system of the host. They differ only in their
    /// directories, and in what the guest itself enforces for each container.
    pub group: &'a str,
}

impl JoinedMount<'_> {
    /// Returns the name of a mount. `number` makes the name unique, and `key` is the rest of the name.
    pub fn name(&self, number: u64, key: &str) -> String {
        format!("{number}-{}{}.{key}", if self.writable { 'w' } else { 'r' }, self.group)
    }
}

/// Returns how a mount with a name is joined with other mounts, if it is. The guest then has one node for each file,
/// whatever mount leads to the file.
pub fn joined_mount(name: &str) -> Option<JoinedMount<'_>> {
    let (_, text) = name.split_once('.')?.0.split_once('-')?;
    let (writable, group) = match text.strip_prefix('w') {
        Some(group) => (true, group),
        None => (false, text.strip_prefix('r')?),
    };
    Some(JoinedMount { writable, group })
}

/// A directory shared with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Tag by which the guest mounts the share.
    pub tag: String,
    /// Directory on the host, in the VMM process's mount namespace.
    pub root: String,
    /// Number of worker threads, 1 to 64.
    pub workers: u8,
    /// How long the guest caches names and attributes of volumes that others can change, in ms, 0 to 60000.
    pub volume_cache_ms: u32,
    /// Rate limit of the requests.
    pub rate_limit: RateLimit,
}

/// A network interface backed by a tap. The interface has one queue pair for each queue of the tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap's queues, 1 to 8: open fds of `/dev/net/tun`, attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. Several
    /// fds are attached to the same interface, with IFF_MULTI_QUEUE.
    pub taps: Vec<FdIndex>,
    /// Whether the VMM may request vhost-net ([`Notice::VhostRequested`](crate::control::Notice::VhostRequested)).
    /// vhost-net does not look at the frames. Therefore, the filters on the other side of the tap must do the MAC
    /// anti-spoofing.
    pub vhost: bool,
    /// The guest's MAC address. The VMM drops frames from the guest that have another source MAC. If vhost-net carries
    /// the frames, the filters on the other side of the tap drop such frames.
    pub mac: [u8; 6],
    /// MTU in bytes, 68 to 65535.
    pub mtu: u16,
    /// Rate limit of the frames that the guest receives. An interface with a rate limit has one queue pair and no
    /// vhost-net.
    pub receive_rate_limit: RateLimit,
    /// Rate limit of the frames that the guest transmits.
    pub transmit_rate_limit: RateLimit,
}

/// A disk backed by a raw file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The open file or block device.
    pub file: FdIndex,
    /// Whether the disk refuses writes.
    pub read_only: bool,
    /// Serial number of the disk in the guest, at most 20 bytes.
    pub serial: String,
    /// Rate limit of the requests.
    pub rate_limit: RateLimit,
}

/// Limits the rates of a device, or of one direction of a device. The default limits nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Limits the bytes of requests, frames or packets. Headers of the device's protocol do not count.
    pub bytes: Option<Rate>,
    /// Limits the number of requests, frames or packets.
    pub operations: Option<Rate>,
}

impl RateLimit {
    /// Returns whether the rate of bytes or of operations is limited.
    pub fn is_limited(self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }
}

/// The parameters of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Average rate, at least 1.
    pub per_second: u64,
    /// Amount that may exceed the average rate at once, at least 1.
    pub burst: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_mounts_say_who_changes_the_files() {
        let properties = |name| mount_properties(name).map(|MountProperties { kind, local }| (kind, local));
        assert_eq!(properties("rootfs"), Some((MountKind::Rootfs, true)));
        assert_eq!(properties("host-rootfs"), Some((MountKind::HostRootfs, true)));
        assert_eq!(properties("0.fd-1a-7-1-private"), Some((MountKind::EmptyDir, false)));
        assert_eq!(properties("0.fd-1a-7-1-u0-1-2-g0-1-2-local-private"), Some((MountKind::EmptyDir, true)));
        assert_eq!(properties("3-w1000-fd-local.fd-1a-7-1-local"), Some((MountKind::Volume, true)));
        assert_eq!(properties("3-r1000-fd.fd-1a-7-1"), Some((MountKind::Volume, false)));
        for other in ["mounts", ".volumes", "x-private", "c1.x-private", "rootfs-local", ""] {
            assert_eq!(properties(other), None, "{other}");
        }
    }
}
