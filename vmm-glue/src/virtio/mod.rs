//! Virtio: the transport, and what every device has in common.

pub mod activation;
pub mod balloon;
pub mod blk;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod slots;
#[cfg(test)]
mod testing;
pub mod vsock;
pub mod workers;
