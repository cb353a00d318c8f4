//! The header of a vsock packet (virtio 1.2, 5.10.6).
//!
//! The `virtio-vsock` crate is not used, because this crate supports a payload only in a single descriptor. Drivers may
//! split a packet in any way (2.7.4.3), and Linux splits packets for MSG_ZEROCOPY.

/// Length of a header in bytes.
pub const HEADER_LEN: usize = HEADER_SIZE as usize;
/// The same length in the type that virtqueues use.
pub const HEADER_SIZE: u32 = 44;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// Maximum length of a payload from a driver: VIRTIO_VSOCK_MAX_PKT_BUF_SIZE in Linux.
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender receives no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags of SHUTDOWN.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operation of a packet (5.10.6: `VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    ReadWrite,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(value: u16) -> Self {
        match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::ReadWrite => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// The header of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Source CID.
    pub src_cid: u64,
    /// Destination CID.
    pub dst_cid: u64,
    /// Source port.
    pub src_port: u32,
    /// Destination port.
    pub dst_port: u32,
    /// Length of the payload in bytes.
    pub len: u32,
    /// Socket type: [`TYPE_STREAM`].
    pub kind: u16,
    /// Operation.
    pub op: Op,
    /// Flags of a SHUTDOWN packet, which say which directions are shut down.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Total number of bytes that the sender has taken out of its receive buffer.
    pub fwd_cnt: u32,
}

impl Header {
    /// Parses the wire format.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, d0, d1, d2, d3, d4, d5, d6, d7, rest @ ..] = *bytes;
        let [p0, p1, p2, p3, q0, q1, q2, q3, l0, l1, l2, l3, t0, t1, o0, o1, rest @ ..] = rest;
        let [f0, f1, f2, f3, b0, b1, b2, b3, c0, c1, c2, c3] = rest;
        Self {
            src_cid: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            dst_cid: u64::from_le_bytes([d0, d1, d2, d3, d4, d5, d6, d7]),
            src_port: u32::from_le_bytes([p0, p1, p2, p3]),
            dst_port: u32::from_le_bytes([q0, q1, q2, q3]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            kind: u16::from_le_bytes([t0, t1]),
            op: u16::from_le_bytes([o0, o1]).into(),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
            buf_alloc: u32::from_le_bytes([b0, b1, b2, b3]),
            fwd_cnt: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// Encodes the wire format.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &u16::from(self.op).to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// Returns the RST packet that refuses this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}
