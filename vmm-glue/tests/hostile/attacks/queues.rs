//! Attacks with the contents of a virtqueue: its descriptors and rings.

use super::{Attack, BALLOON, BLK, Build, FS, HOTPLUG, VSOCK};
use crate::assembler::Size;
use crate::guest::{Desc, Device, Guest, INDIRECT, NEXT, Queue, WRITE, register};
use crate::machine::MEMORY_MIB;

const MEMORY: u64 = MEMORY_MIB << 20;

pub fn attacks() -> Vec<Attack> {
    let mut attacks = vec![
        Attack::on_all("chain of two descriptors that loops", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 16, NEXT, 1), desc(buffer, 16, NEXT, 0)]);
        }),
        Attack::on_all("descriptor that is its own successor", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 16, NEXT, 0)]);
            offer(guest, device, |_, buffer| vec![desc(buffer, 16, NEXT | WRITE, 0)]);
        }),
        Attack::on_all("successor outside of the table", |guest, device| {
            offer(guest, device, |queue, buffer| vec![desc(buffer, 16, NEXT, queue.size)]);
            offer(guest, device, |_, buffer| vec![desc(buffer, 16, NEXT, u16::MAX)]);
        }),
        Attack::on_all("buffers outside of memory", |guest, device| {
            for address in [MEMORY, MEMORY - 8, 0xd000_0000, 1 << 40, u64::MAX - 7, u64::MAX] {
                offer(guest, device, |_, _| vec![desc(address, 16, 0, 0)]);
                offer(guest, device, |_, _| vec![desc(address, 16, WRITE, 0)]);
                offer(guest, device, |_, buffer| vec![desc(buffer, 16, NEXT, 1), desc(address, 16, WRITE, 0)]);
            }
        }),
        Attack::on_all("buffers that end outside of memory", |guest, device| {
            for length in [MEMORY as u32, 0x7fff_ffff, u32::MAX] {
                offer(guest, device, |_, buffer| vec![desc(buffer, length, 0, 0)]);
                offer(guest, device, |_, buffer| vec![desc(buffer, length, WRITE, 0)]);
            }
        }),
        Attack::on_all("chains with a length of zero", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 0, 0, 0)]);
            offer(guest, device, |_, buffer| vec![desc(buffer, 0, WRITE, 0)]);
            offer(guest, device, |_, _| vec![desc(u64::MAX, 0, NEXT, 1), desc(u64::MAX, 0, WRITE, 0)]);
        }),
        Attack::on_all("readable descriptor after a writable one", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 64, WRITE | NEXT, 1), desc(buffer, 64, 0, 0)]);
        }),
        Attack::on_all("request in a writable buffer, answer in a readable buffer", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 512, WRITE, 0)]);
            offer(guest, device, |_, buffer| vec![desc(buffer, 512, 0, 0)]);
        }),
        Attack::on_all("unknown flags of descriptors", |guest, device| {
            for flags in [8, 0x10, 0x8000, !(NEXT | INDIRECT)] {
                offer(guest, device, |_, buffer| vec![desc(buffer, 64, flags, 0)]);
            }
        }),
        Attack::on_all("answer that overwrites the queue itself", |guest, device| {
            for part in [|queue: &Queue| queue.desc, |queue: &Queue| queue.avail, |queue: &Queue| queue.used] {
                offer(guest, device, |queue, buffer| {
                    vec![desc(buffer, 44, NEXT, 1), desc(part(queue), 4096, WRITE, 0)]
                });
                offer(guest, device, |queue, _| vec![desc(part(queue), 4096, WRITE, 0)]);
            }
        }),
        Attack::on_all("full table of overlapping large buffers", |guest, device| {
            for flags in [0, WRITE] {
                offer(guest, device, |queue, _| {
                    let chain = |next| desc(0, 32 << 20, flags | NEXT, next);
                    let mut descs: Vec<_> = (1..queue.size).map(chain).collect();
                    descs.push(desc(0x100_0000, 16 << 20, flags, 0));
                    if flags == WRITE {
                        // Use only buffers from 0x200_0000 upwards. Otherwise, the device would overwrite the
                        // attacker's code, which is below this address.
                        descs.iter_mut().for_each(|desc| (desc.addr, desc.len) = (0x200_0000, 16 << 20));
                    }
                    descs
                });
            }
        }),
        Attack::on_all("heads outside of the table", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[usize::from(device.queue)];
            for head in [queue.size, queue.size + 1, 0x8000, u16::MAX] {
                guest.offer(queue, head);
            }
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on_all("jumps of the available index", |guest, device| {
            for index in [device.queues[usize::from(device.queue)] + 1, 0x7fff, 0x8000, u16::MAX] {
                let queue = guest.start(device)[usize::from(device.queue)];
                guest.store16(queue.avail + 2, queue.base.wrapping_add(index));
                guest.write(device, register::QUEUE_NOTIFY, device.queue.into());
                guest.settle(device, &queue);
            }
        }),
        Attack::on_all("available index that goes back", |guest, device| {
            let mut queues = guest.start(device);
            let (request, answer) = (device.request)();
            let queue = &mut queues[usize::from(device.queue)];
            guest.request(queue, 0, &request, answer);
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
            guest.store16(queue.avail + 2, queue.base);
            guest.write(device, register::QUEUE_NOTIFY, device.queue.into());
            guest.settle(device, &Queue { used: queue.used + 2, base: 0, ..queue });
        }),
        Attack::on_all("same head many times", |guest, device| {
            let queue = offer_one_head(guest, device);
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on_all("descriptors that change while the device reads them", |guest, device| {
            let queue = offer_one_head(guest, device);
            let notify = device.register(register::QUEUE_NOTIFY);
            guest.repeat(200, |code| {
                code.add16(queue.avail + 2, queue.size);
                code.store32(notify, device.queue.into());
                for (length, flags, next) in [(u32::MAX, 1, 0), (16, 3, 1), (0, 1, 0xffff), (44, 1, 1), (16, 4, 0)] {
                    code.store32(queue.desc + 8, length);
                    code.store16(queue.desc + 12, flags);
                    code.store16(queue.desc + 14, next);
                }
            });
            guest.settle(device, &queue);
        }),
    ];
    attacks.push(Attack::on_all("queue that a second vCPU overwrites while the device serves it", |guest, device| {
        let queue = offer_one_head(guest, device);
        let notify = device.register(register::QUEUE_NOTIFY);
        let overwrite = Guest::fragment(|body| {
            body.repeat(3000, |code| {
                for (addr, length, flags) in
                    [(MEMORY, 64, 0), (0x200_0000, u32::MAX, 2), (0x200_0000, 64, 1), (0x200_0000, 16, 4)]
                {
                    code.store(Size::Quad, queue.desc, addr);
                    code.store32(queue.desc + 8, length);
                    code.store16(queue.desc + 12, flags);
                    code.store16(queue.avail + 4, flags);
                }
            });
        });
        let done = guest.on_second_vcpu(&overwrite);
        guest.repeat(300, |code| {
            code.add16(queue.avail + 2, queue.size / 2);
            code.store32(notify, device.queue.into());
        });
        guest.wait16(done, 0);
        guest.settle(device, &queue);
    }));
    let indirect: [(&'static str, Build); 3] = [
        ("indirect table in an indirect table", |guest, device| {
            offer(guest, device, |_, buffer| vec![desc(buffer, 4096, INDIRECT, 0)]);
            offer(guest, device, |queue, _| vec![desc(queue.desc, 16 * u32::from(queue.size), INDIRECT, 0)]);
        }),
        ("indirect table with an impossible length", |guest, device| {
            for length in [0, 1, 15, 17, 16 * 0x1_0000, u32::MAX] {
                offer(guest, device, |_, buffer| vec![desc(buffer, length, INDIRECT, 0)]);
            }
            offer(guest, device, |_, buffer| vec![desc(buffer, 16, INDIRECT | NEXT | WRITE, 0)]);
        }),
        ("indirect table outside of memory", |guest, device| {
            for address in [MEMORY - 16, MEMORY, 0xd000_0000, u64::MAX - 15] {
                offer(guest, device, |_, _| vec![desc(address, 64, INDIRECT, 0)]);
            }
        }),
    ];
    for (name, build) in indirect {
        attacks.push(Attack { devices: vec![VSOCK, FS, BLK, BALLOON], ..Attack::on_all(name, build) });
    }
    attacks.push(
        Attack::on_all("buffers in memory that is not plugged", |guest, device| {
            offer(guest, device, |_, _| vec![desc(HOTPLUG, 64, NEXT, 1), desc(HOTPLUG + 4096, 512, WRITE, 0)]);
            guest.wait_for_end();
        })
        .ends("accessed memory that does not exist"),
    );
    let queue = Attack::on_all("queue in memory that is not plugged", |guest, device| {
        let mut queues = guest.start(device);
        queues[usize::from(device.queue)].avail = HOTPLUG;
        guest.activate(device, &queues);
        guest.write(device, register::QUEUE_NOTIFY, device.queue.into());
        guest.wait_for_end();
    });
    attacks.push(queue.ends("accessed memory that does not exist"));
    attacks
}

/// Starts the device, and offers the same chain in each entry of the request queue's available ring. Returns this
/// queue.
fn offer_one_head(guest: &mut Guest, device: &Device) -> Queue {
    let mut queues = guest.start(device);
    let (request, answer) = (device.request)();
    let queue = &mut queues[usize::from(device.queue)];
    guest.request(queue, 0, &request, answer);
    (1..queue.size).for_each(|_| guest.offer(queue, 0));
    *queue
}

pub fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// Activates the device, and offers a chain that begins with the first descriptor that `descs` returns. `descs` gets
/// the queue and the address of a buffer. The buffer contains an indirect table whose first descriptor refers to the
/// table itself.
pub fn offer(guest: &mut Guest, device: &Device, descs: impl FnOnce(&Queue, u64) -> Vec<Desc>) {
    let mut queues = guest.start(device);
    let queue = &mut queues[usize::from(device.queue)];
    let buffer = guest.allocate(4096);
    guest.put(buffer, &desc(buffer, 4096, INDIRECT, 0).bytes());
    for (at, desc) in (0..).zip(descs(queue, buffer)) {
        guest.describe(queue, at, desc);
    }
    guest.offer(queue, 0);
    let queue = *queue;
    guest.publish(device, &queue);
    guest.settle(device, &queue);
}
