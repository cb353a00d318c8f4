//! One FUSE request: what must hold before virtiofsd sees it, and the answer when it could not give one.

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::server::Server;

use super::whole::Whole;
use crate::virtio::device::GuestMemory;
use crate::virtio::queue::{Chain, guest_fault};

/// FUSE operations without an answer (include/uapi/linux/fuse.h).
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
/// Bytes of `struct fuse_out_header`.
const OUT_HEADER: usize = 16;

/// The start of `struct fuse_in_header`.
struct Start {
    opcode: u32,
    unique: u64,
}

fn start(chain: &Chain<'_>) -> Option<Start> {
    let mut bytes = [0; OUT_HEADER];
    if chain.readable.copy_to(&mut bytes) < bytes.len() {
        return None;
    }
    let [_, _, _, _, o0, o1, o2, o3, u0, u1, u2, u3, u4, u5, u6, u7] = bytes;
    Some(Start {
        opcode: u32::from_le_bytes([o0, o1, o2, o3]),
        unique: u64::from_le_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
    })
}

/// Serves a request, which may block; returns the bytes written.
pub fn serve(
    server: &Server<Whole>,
    memory: &GuestMemory,
    chain: Chain<'_>,
    raw: virtio_queue::DescriptorChain<&GuestMemory>,
) -> u32 {
    let Some(start) = start(&chain) else {
        guest_fault(1, &"request without a header");
        return 0;
    };
    let silent = matches!(start.opcode, FORGET | BATCH_FORGET | INTERRUPT | DESTROY);
    // virtiofsd takes room for an answer's header for granted.
    if !silent && chain.writable.len() < OUT_HEADER {
        guest_fault(1, &"request without room for an answer");
        return 0;
    }
    let result = match (Reader::new(memory, raw.clone()), Writer::new(memory, raw)) {
        (Ok(reader), Ok(writer)) => server.handle_message(reader, writer, None::<&mut ()>).map_err(|e| e.to_string()),
        (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
    };
    match result {
        // An answer is at most 1 MiB.
        Ok(written) => u32::try_from(written.min(chain.writable.len())).unwrap_or(0),
        Err(error) => {
            guest_fault(1, &format_args!("FUSE request {}: {error}", start.opcode));
            if silent { 0 } else { refuse(&chain, start.unique, libc::EINVAL) }
        }
    }
}

/// Serves what the high-priority queue is for, without blocking; anything else there is refused.
pub fn serve_quick(
    server: &Server<Whole>,
    memory: &GuestMemory,
    chain: Chain<'_>,
    raw: virtio_queue::DescriptorChain<&GuestMemory>,
) -> u32 {
    match start(&chain) {
        Some(Start { opcode: FORGET | BATCH_FORGET | INTERRUPT, .. }) => serve(server, memory, chain, raw),
        Some(Start { unique, .. }) => refuse(&chain, unique, libc::EOPNOTSUPP),
        None => 0,
    }
}

/// Answers with an error.
fn refuse(chain: &Chain<'_>, unique: u64, errno: i32) -> u32 {
    let mut header = [0; OUT_HEADER];
    let fields: [&[u8]; 3] = [&(OUT_HEADER as u32).to_le_bytes(), &(-errno).to_le_bytes(), &unique.to_le_bytes()];
    for (to, from) in header.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    if chain.writable.copy_from(&header) < OUT_HEADER {
        return 0;
    }
    OUT_HEADER as u32
}
