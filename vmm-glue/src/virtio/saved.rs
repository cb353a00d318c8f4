//! The state of virtio devices that is saved with a VM: the transport's registers, the positions in the queues, and the
//! few values of a device that its driver relies on.
//!
//! A device can be saved while it is paused, if it holds no chain of its driver. The state comes from a file that only
//! root can write, but it is checked as if a driver had written it.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

/// Why a device cannot be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// The type of the device has no state that can be saved.
    #[error("virtio devices of type {0} cannot be saved")]
    Type(u32),
    /// The device holds chains of its driver, or connections.
    #[error("virtio device of type {0} is serving requests")]
    Busy(u32),
    /// The device has failed, or its driver is resetting it.
    #[error("virtio device of type {0} waits for a reset")]
    Reset(u32),
}

/// Why a saved state does not fit a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The saved device has another type.
    #[error("the saved virtio device has the type {saved}, and the device in this slot has the type {device}")]
    Type {
        /// The saved type.
        saved: u32,
        /// The device's type.
        device: u32,
    },
    /// The saved device has other queues.
    #[error("virtio device of type {0}: the saved queues do not fit the device")]
    Queues(u32),
    /// The driver has acknowledged features that the device does not have, or the saved status is not valid.
    #[error("virtio device of type {0}: the saved features or the saved status do not fit the device")]
    Features(u32),
    /// The device could not be activated.
    #[error("virtio device of type {0}: the device loop does not run")]
    Loop(u32),
}

/// The values of a device that are not in its registers or queues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceValues {
    /// The device has no such values.
    #[default]
    None,
    /// The balloon's target and size, in pages.
    Balloon {
        /// The target.
        target: u32,
        /// The size that the guest has reported.
        actual: u32,
    },
    /// The host's port of the next vsock connection. The guest can still know the earlier ports.
    Vsock {
        /// The port.
        next_port: u32,
    },
}

/// The state of an active device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveState {
    /// The queues, in the device's order. The driver need not use the last ones.
    pub queues: Vec<QueueState>,
    /// The other values.
    pub values: DeviceValues,
}

/// A queue ([`QueueState`], which cannot be serialized).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// The state of a device and its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// The device's type.
    pub device_type: u32,
    /// The status register.
    pub status: u32,
    /// The features that the driver has acknowledged.
    pub driver_features: u64,
    /// The registers with which the driver selects a half of the features, and a queue.
    pub selectors: [u32; 3],
    /// The queues.
    pub queues: Vec<SavedQueue>,
    /// The causes of the interrupt that the driver has not acknowledged.
    pub causes: u32,
    /// Number of changes of the configuration space.
    pub generation: u32,
    /// The device's other values.
    pub values: DeviceValues,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        let QueueState { max_size, next_avail, next_used, size, ready, desc_table, avail_ring, used_ring, .. } = state;
        Self { max_size, next_avail, next_used, size, ready, desc_table, avail_ring, used_ring }
    }
}

impl SavedQueue {
    /// Returns the queue, or `None` if the state is not that of a queue with this maximum size.
    pub fn queue(&self, max_size: u16) -> Option<Queue> {
        let Self { next_avail, next_used, size, ready, desc_table, avail_ring, used_ring, .. } = *self;
        // The device sets `event_idx_enabled` from the features.
        let event_idx_enabled = false;
        let state = QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        Queue::try_from(state).ok().filter(|_| self.max_size == max_size)
    }
}
