//! The control queue (virtio 1.2, 5.1.6.5). The only supported command sets the number of active queue pairs.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::guest_memory::GuestMemory;
use crate::virtio::queue::{Chain, QueueFault, Virtqueue, log_guest_fault};

/// Serves the driver's commands. Calls `set` with each requested number of pairs. `set` returns true if that number of
/// pairs is now active. Returns true if there may be more commands.
pub fn serve(
    queue: &mut Virtqueue,
    memory: &GuestMemory,
    mut set: impl FnMut(u16) -> bool,
) -> Result<bool, QueueFault> {
    for _ in 0..queue.size() {
        if let Some(chain) = queue.pop(memory)? {
            let head = chain.head;
            let answer = if pairs(&chain).is_some_and(&mut set) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            // The response is the byte `ack` of struct virtio_net_ctrl. A chain without space for `ack` gets no
            // response.
            let [answer, ..] = answer.to_le_bytes();
            let written = chain.writable.copy_from(&[answer]);
            if written == 0 {
                log_guest_fault(queue.index(), &"the control command has no space for a response");
            }
            queue.push(memory, head, u32::try_from(written).unwrap_or(u32::MAX))?;
        } else if !queue.enable_notification(memory)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns the number of pairs that a command requests, or `None` for any other command.
fn pairs(chain: &Chain<'_>) -> Option<u16> {
    // struct virtio_net_ctrl has a class, a command and the command's data. The data of the supported command is struct
    // virtio_net_ctrl_mq, with 2 bytes. A request with more data is rejected like an unknown command.
    let [class, command, low, high] = chain.readable.clone().take::<4>().ok()?;
    let is_pairs_set = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    (is_pairs_set && chain.readable.len() == 4 && !chain.writable.is_empty()).then_some(u16::from_le_bytes([low, high]))
}
