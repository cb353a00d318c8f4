//! virtio-blk (virtio 1.2, 5.2): a raw file or a block device as a disk.
//!
//! A worker thread of the device serves one request at a time, with plain system calls on guest memory.

#[cfg(test)]
mod rate_limit_tests;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::request::{Disk, MAX_RANGES, MAX_ZEROES};
use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, OnIdle, VirtioDevice};
use super::rate_limit::SharedLimiter;
use super::workers::Workers;
use crate::config::RateLimit;

/// Maximum size of the single request queue.
const QUEUE_SIZES: [u16; 1] = [128];
/// Maximum number of data segments in a request. The queue's two remaining descriptors are for the header and the
/// status.
const SEGMENTS: u32 = 126;
/// Size of a sector in bytes. The protocol counts in sectors.
pub const SECTOR: u64 = SECTOR_SIZE as u64;
/// The same size in the type of the configuration field `blk_size`.
const SECTOR_SIZE: u32 = 512;
/// Length of the serial number in bytes.
pub const SERIAL_LEN: usize = 20;

/// Error from creating a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The serial number has more than [`SERIAL_LEN`] bytes.
    #[error("invalid disk serial {0:?}: it is longer than {SERIAL_LEN} bytes")]
    Serial(String),
    /// The file's size could not be determined.
    #[error("failed to determine the disk's size")]
    Size(#[source] io::Error),
    /// The worker thread could not be started or confined.
    #[error("failed to start the disk's thread")]
    Thread(#[source] io::Error),
}

/// The disk device.
pub struct Blk {
    disk: Arc<Disk>,
    workers: Workers<Disk>,
}

impl Blk {
    /// Creates a disk with the file's size, rounded down to whole sectors.
    pub fn new(mut file: File, read_only: bool, serial: &str, rate_limit: RateLimit) -> Result<Self, BlkError> {
        if serial.len() > SERIAL_LEN {
            return Err(BlkError::Serial(serial.to_owned()));
        }
        let mut bytes = [0; SERIAL_LEN];
        for (to, from) in bytes.iter_mut().zip(serial.as_bytes()) {
            *to = *from;
        }
        // Determine the size with a seek to the end, because fstat reports size 0 for a block device.
        let sectors = file.seek(SeekFrom::End(0)).map_err(BlkError::Size)? / SECTOR;
        let limiter = SharedLimiter::new(rate_limit);
        let disk = Arc::new(Disk { file, sectors, read_only, serial: bytes, limiter });
        let workers = Workers::start(1, Arc::clone(&disk)).map_err(BlkError::Thread)?;
        Ok(Self { disk, workers })
    }

    /// Returns the bytes of `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend(self.disk.sectors.to_le_bytes());
        // The device does not offer size_max.
        config.extend(0_u32.to_le_bytes());
        config.extend(SEGMENTS.to_le_bytes());
        // The device does not offer a geometry.
        config.extend([0; 4]);
        config.extend(SECTOR_SIZE.to_le_bytes());
        // The device does not offer a topology, writeback or several queues.
        config.extend([0; 12]);
        // These fields are max_discard_sectors, max_discard_seg and discard_sector_alignment.
        for word in [sectors(MAX_ZEROES), segments(MAX_RANGES), 1] {
            config.extend(word.to_le_bytes());
        }
        // These fields are max_write_zeroes_sectors, max_write_zeroes_seg and write_zeroes_may_unmap.
        let (ranges, zeroes) = self.disk.max_write_zeroes();
        for word in [sectors(zeroes), segments(ranges), 1] {
            config.extend(word.to_le_bytes());
        }
        config
    }
}

/// Returns a number of segments as a field of the configuration.
fn segments(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Returns the number of sectors in `bytes`.
fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

impl MutEventSubscriber for Blk {
    fn init(&mut self, _ops: &mut EventOps) {
        // Nothing is registered with the device loop, because the worker thread waits for the queue's notifications.
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE;
        common
            | if self.disk.read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::queue::read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let OpenedActivation { memory, interrupt, queues: [queue], .. } = activation::open_queues(activation)?;
        self.workers
            .activate(memory, queue, interrupt)
            .map_err(|error| ActivateError::Host("the virtio-blk thread", error))
    }

    fn reset(&mut self) {
        self.workers.deactivate();
    }

    fn when_idle(&mut self, idle: OnIdle) {
        self.workers.when_idle(idle);
    }

    fn pause(&mut self) {
        self.workers.pause();
    }

    fn resume(&mut self) {
        self.workers.resume();
    }
}
