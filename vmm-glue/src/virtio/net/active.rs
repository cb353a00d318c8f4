//! What of an interface there is from the driver's readiness to its next reset, and who serves it meanwhile.

use std::fs::File;
use std::sync::Arc;

use event_manager::EventOps;
use vmm_sys_util::eventfd::EventFd;

use super::Port;
use super::load::Load;
use super::pump::{Lane, Rules};
use super::vhost::{self, VhostError};
use crate::virtio::device::{GuestMemory, Interrupt};
use crate::virtio::queue::{Vq, Wake, chain_of_causes};

/// A device whose driver is ready.
pub struct Active {
    pub memory: Arc<GuestMemory>,
    pub interrupt: Arc<dyn Interrupt>,
    /// The pairs that the driver has set up.
    pub lanes: Vec<Lane>,
    /// So many of them, the first, it uses.
    pub in_use: usize,
    pub control: Option<Vq>,
    pub control_waiting: bool,
    pub rules: Rules,
    pub load: Load,
    pub features: u64,
    pub carrier: Carrier,
}

/// Who carries the frames.
#[derive(PartialEq, Eq)]
pub enum Carrier {
    Loop,
    Kernel,
    /// The kernel, which stands still.
    KernelPaused,
}

impl Active {
    /// Registers the queues that are the loop's, and looks at all of them.
    pub fn register(&mut self, ops: &mut EventOps) {
        if let Some(control) = &mut self.control {
            Wake::register(ops, control);
        }
        self.control_waiting = true;
        if self.carrier == Carrier::Loop {
            for lane in &mut self.lanes {
                Wake::register(ops, &mut lane.rx);
                Wake::register(ops, &mut lane.tx);
                lane.wait();
            }
        }
    }

    /// The driver has notified a queue.
    pub fn notified(&mut self, token: u32) {
        if let Some(control) = self.control.as_ref().filter(|control| u32::from(control.index()) == token) {
            control.notified();
            self.control_waiting = true;
        } else if let Some(lane) = self.lanes.get_mut(token as usize / 2) {
            if token.is_multiple_of(2) {
                lane.rx.notified();
                lane.rx_waiting = true;
            } else {
                lane.tx.notified();
                lane.tx_waiting = true;
            }
        }
    }

    /// The pairs with what the kernel serves them by.
    fn served<'a>(
        lanes: &'a mut [Lane],
        ports: &'a [Port],
    ) -> impl Iterator<Item = (&'a mut Lane, &'a File, &'a (File, EventFd))> {
        lanes.iter_mut().zip(ports).filter_map(|(lane, port)| Some((lane, &port.tap, port.vhost.as_ref()?)))
    }

    pub fn start_vhost(&mut self, ports: &[Port]) -> Result<(), VhostError> {
        let call = self.interrupt.hand_over().map_err(VhostError::Interrupt)?;
        let mut result = Ok(());
        for (lane, tap, (file, fault)) in Self::served(&mut self.lanes, ports) {
            let queues = [&lane.rx, &lane.tx];
            result = result.and_then(|()| vhost::start(file, tap, &self.memory, self.features, queues, &call, fault));
        }
        if result.is_err() {
            self.stop_vhost(ports);
        }
        result
    }

    pub fn stop_vhost(&mut self, ports: &[Port]) {
        for (_, _, (file, _)) in Self::served(&mut self.lanes, ports) {
            vhost::stop(file, &self.memory);
        }
    }

    /// Has the kernel stand still.
    pub fn pause_vhost(&mut self, ports: &[Port]) {
        self.carrier = Carrier::KernelPaused;
        for (lane, _, (file, _)) in Self::served(&mut self.lanes, ports) {
            if let Err(error) = vhost::pause(file, &self.memory, [&mut lane.rx, &mut lane.tx]) {
                log::error!("virtio-net: {}", chain_of_causes(&error));
            }
        }
    }

    /// Has it go on.
    pub fn resume_vhost(&mut self, ports: &[Port]) -> Result<(), VhostError> {
        self.carrier = Carrier::Kernel;
        for (lane, tap, (file, _)) in Self::served(&mut self.lanes, ports) {
            vhost::resume(file, tap, &self.memory, [&lane.rx, &lane.tx])?;
        }
        Ok(())
    }
}
