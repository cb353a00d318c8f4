//! Virtio: the transport, and what every device has in common.

pub mod device;
