//! Virtio: the transport, and what every device has in common.

pub mod balloon;
pub mod blk;
pub mod net;
pub mod rng;
pub mod workers;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod slots;
pub mod queue;
pub mod vsock;
#[cfg(test)]
mod testing;
