//! The list of attacks, and the devices under attack.

mod disk_and_net;
mod files;
mod machine;
mod memory;
mod queues;
mod transport;
mod vhost;
mod vsock;

use husk_vmm::arch::layout;

use crate::guest::{Device, Guest, INDIRECT_DESC, VERSION_1};
use crate::machine::{Host, MAC};

/// Maximum number of notices that the VMM may send to the shim in one attack. The VMM reports boot steps, and that it
/// is close to its fd limit.
pub const NOTICES: usize = 8;

/// How an attack has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The VMM survives, and the device serves a valid request.
    Survives,
    /// The VMM reports the end of the VM, with a reason that contains this text.
    Ends(&'static str),
    /// Either `Survives` or `Ends`. The result depends on the host's KVM.
    Either(&'static str),
}

/// A function that adds an attack on a device to the attacker's code.
pub type Build = fn(&mut Guest, &Device);

/// An attack.
pub struct Attack {
    pub name: &'static str,
    /// The devices to attack. The attack on each device runs in a separate VM.
    pub devices: Vec<Device>,
    pub build: Build,
    pub host: Host,
    pub expect: Expect,
}

impl Attack {
    /// Returns an attack on each kind of device.
    fn on_all(name: &'static str, build: Build) -> Self {
        Self { name, devices: DEVICES.to_vec(), build, host: Host::default(), expect: Expect::Survives }
    }

    /// Returns an attack on one device.
    fn on(device: Device, name: &'static str, build: Build) -> Self {
        Self { devices: vec![device], ..Self::on_all(name, build) }
    }

    fn with_host(self, host: Host) -> Self {
        Self { host, ..self }
    }

    fn may_end(self, text: &'static str) -> Self {
        Self { expect: Expect::Either(text), ..self }
    }

    fn ends(self, text: &'static str) -> Self {
        Self { expect: Expect::Ends(text), ..self }
    }
}

/// Returns all attacks.
pub fn all() -> Vec<Attack> {
    let groups = [
        transport::attacks(),
        queues::attacks(),
        files::attacks(),
        vsock::attacks(),
        memory::attacks(),
        disk_and_net::attacks(),
        machine::attacks(),
    ];
    groups.into_iter().flatten().collect()
}

/// Returns the attacks on an interface whose queues vhost-net serves.
pub fn all_on_vhost_net() -> Vec<Attack> {
    vhost::attacks()
}

/// All kinds of devices, in the order of their slots.
pub const DEVICES: [Device; 7] = [VSOCK, FS, NET, BLK, RNG, BALLOON, MEM];

pub const VSOCK: Device = Device {
    name: "vsock",
    slot: 0,
    features: VERSION_1 | INDIRECT_DESC,
    queues: &[128, 128, 8],
    queue: 1,
    request: || (vsock_packet(1, 1, 1, 2, 0, &[]), 0),
    vhost: false,
};

pub const FS: Device = Device {
    name: "fs",
    slot: 1,
    features: VERSION_1 | INDIRECT_DESC,
    queues: &[64, 512],
    queue: 1,
    request: || (fuse_init(), 4096),
    vhost: false,
};

pub const NET: Device = Device {
    name: "net",
    slot: 2,
    features: VERSION_1,
    queues: &[256, 256],
    queue: 1,
    request: || ([&[0; 12][..], &[0xff; 6], &MAC, &[0x88, 0xb5], &[0; 46]].concat(), 0),
    vhost: false,
};

pub const BLK: Device = Device {
    name: "blk",
    slot: 3,
    features: VERSION_1 | INDIRECT_DESC,
    queues: &[128],
    queue: 0,
    request: || (disk_request(0, 0), 513),
    vhost: false,
};

pub const RNG: Device = Device {
    name: "rng",
    slot: 4,
    features: VERSION_1,
    queues: &[8],
    queue: 0,
    request: || (Vec::new(), 64),
    vhost: false,
};

pub const BALLOON: Device = Device {
    name: "balloon",
    slot: 5,
    // VIRTIO_BALLOON_F_REPORTING
    features: VERSION_1 | INDIRECT_DESC | 1 << 5,
    queues: &[64, 64, 64],
    queue: 0,
    request: || (SPARE_PAGE.to_le_bytes().to_vec(), 0),
    vhost: false,
};

pub const MEM: Device = Device {
    name: "mem",
    slot: 7,
    // VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    features: VERSION_1 | 1 << 1,
    queues: &[8],
    queue: 0,
    request: || (mem_request(3, HOTPLUG, 1), 10),
    vhost: false,
};

/// Number of a page that the attacker does not use.
pub const SPARE_PAGE: u32 = 0x3000;
/// Start of hot-plugged memory.
pub const HOTPLUG: u64 = layout::HOLE_END;

/// Returns a virtio-vsock packet from the guest to the host.
pub fn vsock_packet(kind: u16, op: u16, src_port: u32, dst_port: u32, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(3u64.to_le_bytes());
    packet.extend(2u64.to_le_bytes());
    for word in [src_port, dst_port, len] {
        packet.extend(word.to_le_bytes());
    }
    packet.extend(kind.to_le_bytes());
    packet.extend(op.to_le_bytes());
    // Flags, buf_alloc and fwd_cnt.
    for word in [0u32, 1 << 16, 0] {
        packet.extend(word.to_le_bytes());
    }
    packet.extend_from_slice(payload);
    packet
}

/// Returns a FUSE request with a valid header.
pub fn fuse(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend((40 + body.len() as u32).to_le_bytes());
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend_from_slice(body);
    request
}

pub fn fuse_init() -> Vec<u8> {
    let mut body = Vec::new();
    // Version 7.38, a maximum readahead of 128 KiB, and the flag FUSE_SUBMOUNTS.
    for word in [7u32, 38, 0x2_0000, 1 << 27] {
        body.extend(word.to_le_bytes());
    }
    body.resize(64, 0);
    fuse(26, 0, &body)
}

/// Returns the header of a disk request.
pub fn disk_request(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Returns a virtio-mem request.
pub fn mem_request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend(kind.to_le_bytes());
    request.resize(8, 0);
    request.extend(address.to_le_bytes());
    request.extend(count.to_le_bytes());
    request.resize(24, 0);
    request
}
