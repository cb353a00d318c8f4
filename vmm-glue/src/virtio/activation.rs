//! What every device does when its driver is ready, and when the driver breaks a queue.

use std::sync::Arc;

use super::device::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use super::queue::{Vq, chain_of_causes};

/// An activation whose queues are taken over.
pub struct Opened<Q> {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Feature bits that the driver acknowledged.
    pub features: u64,
    /// How the device interrupts the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The queues in the device's order.
    pub queues: Q,
}

/// Takes over all queues of a device that has `N`.
///
/// # Errors
/// [`ActivateError::Queue`] when there are more or fewer, or the rings of one are not in guest memory.
pub fn open<const N: usize>(activation: Activation) -> Result<Opened<[Vq; N]>, ActivateError> {
    let given = activation.queues.len();
    if given > N {
        return Err(ActivateError::Queue(given));
    }
    let Opened { memory, features, interrupt, queues } = open_first(activation, N)?;
    let queues = queues.try_into().map_err(|_| ActivateError::Queue(given))?;
    Ok(Opened { memory, features, interrupt, queues })
}

/// Takes over the first `count` queues, for a device of which the driver need not use all.
///
/// # Errors
/// [`ActivateError::Queue`] when there are fewer, or the rings of one are not in guest memory.
pub fn open_first(activation: Activation, count: usize) -> Result<Opened<Vec<Vq>>, ActivateError> {
    let Activation { memory, features, queues, interrupt } = activation;
    let queues = (0..)
        .zip(queues)
        .take(count)
        .map(|(index, queue)| Vq::new(queue, index, &memory, features))
        .collect::<Result<Vec<_>, _>>()?;
    if queues.len() < count {
        return Err(ActivateError::Queue(queues.len()));
    }
    Ok(Opened { memory: Arc::new(memory), features, interrupt, queues })
}

/// Stops a device whose driver broke a queue, and asks the driver for a reset if the device was active.
pub fn stop(
    device: &mut impl VirtioDevice,
    name: &str,
    fault: &dyn std::error::Error,
    interrupt: Option<Arc<dyn Interrupt>>,
) {
    log::error!("{name}: device stopped: {}", chain_of_causes(fault));
    device.reset();
    if let Some(Err(error)) = interrupt.map(|interrupt| interrupt.needs_reset()) {
        log::error!("{name}: cannot ask for a reset: {error}");
    }
}
