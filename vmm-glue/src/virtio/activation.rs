//! Activates a device when its driver is ready. Stops a device whose driver broke a queue.

use std::sync::Arc;

use husk_base::error::chain;

use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::Virtqueue;
use crate::guest_memory::GuestMemory;

/// The content of an [`Activation`], with opened queues.
pub struct OpenedActivation<Q> {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Feature bits that the driver has acknowledged.
    pub features: u64,
    /// Interrupts the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The queues, in the device's order.
    pub queues: Q,
}

/// Takes over all queues of a device that has `N` queues.
///
/// # Errors
/// [`ActivateError::Queue`] if there are not exactly `N` queues, or if the rings of a queue are not in guest memory.
pub fn open_queues<const N: usize>(activation: Activation) -> Result<OpenedActivation<[Virtqueue; N]>, ActivateError> {
    let count = activation.queues.len();
    if count > N {
        return Err(ActivateError::Queue(count));
    }
    let OpenedActivation { memory, features, interrupt, queues } = open_first_queues(activation, N)?;
    let queues = queues.try_into().map_err(|_| ActivateError::Queue(count))?;
    Ok(OpenedActivation { memory, features, interrupt, queues })
}

/// Takes over the first `count` queues of a device whose driver does not have to use all queues.
///
/// # Errors
/// [`ActivateError::Queue`] if there are fewer than `count` queues, or if the rings of a queue are not in guest memory.
pub fn open_first_queues(
    activation: Activation,
    count: usize,
) -> Result<OpenedActivation<Vec<Virtqueue>>, ActivateError> {
    let Activation { memory, features, queues, interrupt } = activation;
    let queues = (0..)
        .zip(queues)
        .take(count)
        .map(|(index, queue)| Virtqueue::new(queue, index, &memory, features))
        .collect::<Result<Vec<_>, _>>()?;
    if queues.len() < count {
        return Err(ActivateError::Queue(queues.len()));
    }
    Ok(OpenedActivation { memory: Arc::new(memory), features, interrupt, queues })
}

/// Stops a device whose driver broke a queue. Requests a reset from the driver if the device was active.
pub fn stop_broken_device(
    device: &mut impl VirtioDevice,
    name: &str,
    fault: &dyn std::error::Error,
    interrupt: Option<Arc<dyn Interrupt>>,
) {
    log::error!("{name}: stopped the device: {}", chain(fault));
    device.reset();
    if let Some(Err(error)) = interrupt.map(|interrupt| interrupt.needs_reset()) {
        log::error!("{name}: failed to request a reset: {error}");
    }
}
