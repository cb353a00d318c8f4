//! The control queue (virtio 1.2, 5.1.6.5): how many pairs of queues the driver uses, and nothing else.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::device::GuestMemory;
use crate::virtio::queue::{Chain, QueueFault, Vq, guest_fault};

/// Serves what the driver has asked; `set` is told each number of pairs, and says whether it can be. True when there
/// may be more.
pub fn serve(queue: &mut Vq, memory: &GuestMemory, mut set: impl FnMut(u16) -> bool) -> Result<bool, QueueFault> {
    for _ in 0..queue.size() {
        if let Some(chain) = queue.pop(memory)? {
            let head = chain.head;
            let answer = if pairs(&chain).is_some_and(&mut set) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            // One byte, `ack`, as far as the driver has room for it.
            let written = chain.writable.copy_from(&[answer as u8]);
            if written == 0 {
                guest_fault(queue.index(), &"command without room for an answer");
            }
            queue.push(memory, head, written as u32)?;
        } else if !queue.listen(memory)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many pairs a command asks for, if that is what it is.
fn pairs(chain: &Chain<'_>) -> Option<u16> {
    // struct virtio_net_ctrl: class, command, then what belongs to it: struct virtio_net_ctrl_mq. No more than that, or
    // it is some other command's.
    let [class, command, low, high] = chain.readable.clone().take::<4>().ok()?;
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    (known && chain.readable.len() == 4 && !chain.writable.is_empty()).then_some(u16::from_le_bytes([low, high]))
}
