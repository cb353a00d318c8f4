//! The state of an interface from its activation to its next reset. The state includes the data path, which moves the
//! interface's frames.

use std::fs::File;
use std::sync::Arc;

use event_manager::EventOps;
use husk_base::error::chain;
use vmm_sys_util::eventfd::EventFd;

use super::load::Load;
use super::pump::{FrameRules, QueuePair};
use super::tap_queue::TapQueue;
use super::vhost::{self, VhostError};
use crate::guest_memory::GuestMemory;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{Virtqueue, WakeEvent};

/// State of a device whose driver is ready.
pub struct Active {
    pub memory: Arc<GuestMemory>,
    pub interrupt: Arc<dyn Interrupt>,
    /// The queue pairs that the driver has set up.
    pub queue_pairs: Vec<QueuePair>,
    /// Number of active queue pairs. The active pairs are the first pairs in `queue_pairs`.
    pub active_pairs: usize,
    pub control: Option<Virtqueue>,
    pub control_waiting: bool,
    pub rules: FrameRules,
    pub load: Load,
    pub features: u64,
    pub data_path: DataPath,
}

/// The component that moves the frames.
#[derive(PartialEq, Eq)]
pub enum DataPath {
    DeviceLoop,
    Vhost,
    /// vhost-net, while it is paused.
    VhostPaused,
}

impl Active {
    /// Registers the queues that the device loop serves, and marks all of them for serving.
    pub fn register(&mut self, ops: &mut EventOps) {
        if let Some(control) = &mut self.control {
            WakeEvent::register(ops, control);
        }
        self.control_waiting = true;
        if self.data_path == DataPath::DeviceLoop {
            for pair in &mut self.queue_pairs {
                WakeEvent::register(ops, &mut pair.rx);
                WakeEvent::register(ops, &mut pair.tx);
                pair.mark_waiting();
            }
        }
    }

    /// Handles the driver's notification of a queue.
    pub fn notified(&mut self, token: u32) {
        if let Some(control) = self.control.as_ref().filter(|control| u32::from(control.index()) == token) {
            control.clear_notification();
            self.control_waiting = true;
        } else if let Some(pair) = self.queue_pairs.get_mut(token as usize / 2) {
            if token.is_multiple_of(2) {
                pair.rx.clear_notification();
                pair.rx_waiting = true;
            } else {
                pair.tx.clear_notification();
                pair.tx_waiting = true;
            }
        }
    }

    /// Returns the queue pairs with their taps and vhost-net files.
    fn vhost_pairs<'a>(
        queue_pairs: &'a mut [QueuePair],
        tap_queues: &'a [TapQueue],
    ) -> impl Iterator<Item = (&'a mut QueuePair, &'a File, &'a (File, EventFd))> {
        queue_pairs
            .iter_mut()
            .zip(tap_queues)
            .filter_map(|(pair, tap_queue)| Some((pair, &tap_queue.tap, tap_queue.vhost.as_ref()?)))
    }

    pub fn start_vhost(&mut self, tap_queues: &[TapQueue]) -> Result<(), VhostError> {
        let call = self.interrupt.share_irq().map_err(VhostError::Interrupt)?;
        let mut result = Ok(());
        for (pair, tap, (file, fault)) in Self::vhost_pairs(&mut self.queue_pairs, tap_queues) {
            let queues = [&pair.rx, &pair.tx];
            result = result.and_then(|()| vhost::start(file, tap, &self.memory, self.features, queues, &call, fault));
        }
        if result.is_err() {
            self.stop_vhost(tap_queues);
        }
        result
    }

    pub fn stop_vhost(&mut self, tap_queues: &[TapQueue]) {
        for (_, _, (file, _)) in Self::vhost_pairs(&mut self.queue_pairs, tap_queues) {
            vhost::stop(file, &self.memory);
        }
    }

    /// Pauses vhost-net.
    pub fn pause_vhost(&mut self, tap_queues: &[TapQueue]) {
        self.data_path = DataPath::VhostPaused;
        for (pair, _, (file, _)) in Self::vhost_pairs(&mut self.queue_pairs, tap_queues) {
            if let Err(error) = vhost::pause(file, &self.memory, [&mut pair.rx, &mut pair.tx]) {
                log::error!("virtio-net: failed to pause vhost-net: {}", chain(&error));
            }
        }
    }

    /// Resumes vhost-net.
    pub fn resume_vhost(&mut self, tap_queues: &[TapQueue]) -> Result<(), VhostError> {
        self.data_path = DataPath::Vhost;
        for (pair, tap, (file, _)) in Self::vhost_pairs(&mut self.queue_pairs, tap_queues) {
            vhost::resume(file, tap, &self.memory, [&pair.rx, &pair.tx])?;
        }
        Ok(())
    }
}
