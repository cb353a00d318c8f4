//! Virtio: the virtio-mmio transport, the devices, and what all devices share.

pub mod activation;
pub mod balloon;
pub mod blk;
pub mod device;
pub mod fs;
pub mod loop_handle;
pub mod mem;
pub mod mmio;
mod mmio_interrupt;
pub mod net;
pub mod queue;
pub mod rate_limit;
pub mod rng;
pub mod saved;
pub(crate) mod slot_eventfds;
pub mod slots;
#[cfg(any(test, feature = "testing"))]
#[allow(clippy::cast_possible_truncation, clippy::indexing_slicing, clippy::unwrap_used, missing_docs)]
pub mod testing;
pub mod vsock;
pub mod workers;
