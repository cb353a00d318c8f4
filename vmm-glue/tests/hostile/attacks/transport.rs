//! Attacks on the registers of virtio-mmio.

use husk_vmm::arch::layout;

use super::Attack;
use crate::assembler::Size;
use crate::guest::{DRIVER_OK, Desc, Device, FEATURES_OK, Guest, Queue, WRITE, register};

/// Values of a 32-bit register that a device may handle badly.
const EXTREMES: [u32; 10] = [0, 1, 2, 3, 0x7fff, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX];

pub fn attacks() -> Vec<Attack> {
    vec![
        Attack::on_all("configure queues while the device is active", |guest, device| {
            let queues = guest.start(device);
            for queue in 0..=queues.len() as u32 {
                guest.write(device, register::QUEUE_SEL, queue);
                for offset in (register::QUEUE_NUM..=register::QUEUE_USED + 4).step_by(4) {
                    if offset != register::STATUS {
                        EXTREMES.iter().for_each(|&value| guest.write(device, offset, value));
                    }
                }
            }
        }),
        Attack::on_all("turn queues on and off", |guest, device| {
            let queues: Vec<Queue> = (0..).zip(device.queues).map(|(index, &size)| guest.queue(index, size)).collect();
            guest.negotiate(device);
            for round in 0..3 {
                for queue in &queues {
                    guest.set_queue(device, queue);
                    [0, 1, 2, u32::MAX, round]
                        .iter()
                        .for_each(|&ready| guest.write(device, register::QUEUE_READY, ready));
                }
            }
            guest.write(device, register::STATUS, DRIVER_OK);
            for ready in [0, 1, 0, 2] {
                guest.write(device, register::QUEUE_READY, ready);
                guest.write(device, register::QUEUE_NOTIFY, 0);
            }
        }),
        Attack::on_all("place queues outside of memory", |guest, device| {
            let places = [
                0xffff_ffff_ffff_f000,
                layout::HOLE_START,
                layout::slot_address(0),
                u64::from(layout::LAPIC),
                1 << 52,
                (crate::machine::MEMORY_MIB << 20) - 16,
                0x40_0001,
            ];
            for place in places {
                with_queues(guest, device, |queue| (queue.desc, queue.avail, queue.used) = (place, place, place));
                with_queues(guest, device, |queue| queue.avail = place);
                with_queues(guest, device, |queue| queue.used = place);
            }
        }),
        Attack::on_all("give all parts of a queue the same address", |guest, device| {
            with_queues(guest, device, |queue| (queue.avail, queue.used) = (queue.desc, queue.desc));
            // The next addresses are in ordinary guest memory, which also holds the VMM's boot data. Therefore a device
            // accepts these addresses.
            with_queues(guest, device, |queue| (queue.desc, queue.avail, queue.used) = (0, 0x1000, 0x2000));
        }),
        Attack::on_all("give queues impossible sizes", |guest, device| {
            for size in [0, 1, 3, 0x4000, 0x8000, 0xffff] {
                with_queues(guest, device, |queue| queue.size = size);
            }
        }),
        Attack::on_all("set DRIVER_OK without queues", |guest, device| {
            guest.negotiate(device);
            guest.write(device, register::STATUS, DRIVER_OK);
            (0..4).for_each(|queue| guest.write(device, register::QUEUE_NOTIFY, queue));
        }),
        Attack::on_all("set DRIVER_OK without queues, 500 times", |guest, device| {
            let body = Guest::fragment(|body| {
                body.negotiate(device);
                body.write(device, register::STATUS, DRIVER_OK);
            });
            guest.repeat(500, |code| code.raw(&body));
        }),
        Attack::on_all("reset the device in the middle of requests, 100 times", |guest, device| {
            let body = resets(guest, device);
            guest.raw(&body);
        }),
        Attack::on_all("reset the device from two vCPUs at the same time, 100 times", |guest, device| {
            let mut fragments = [(), ()].map(|()| resets(guest, device));
            let [first, second] = &mut fragments;
            let done = guest.on_second_vcpu(second);
            guest.raw(first);
            guest.wait16(done, 0);
        }),
        Attack::on_all("write nonsense to the status", |guest, device| {
            for value in (0..=255).chain(EXTREMES) {
                guest.write(device, register::STATUS, value);
            }
            for status in [1, 3, FEATURES_OK, DRIVER_OK] {
                guest.negotiate(device);
                guest.write(device, register::STATUS, status);
                (0..=255).rev().for_each(|value| guest.write(device, register::STATUS, value));
            }
        }),
        Attack::on_all("negotiate impossible features", |guest, device| {
            for features in [u64::MAX, 0, 1, 1 << 32 | 1 << 63, 0xffff_ffff, 1 << 32 | 0xffff_ffff, 1 << 34] {
                // vhost-net does not start without valid features.
                let device = Device { features, vhost: false, ..*device };
                let queues = guest.start(&device);
                for select in EXTREMES {
                    guest.write(&device, register::DRIVER_FEATURES_SEL, select);
                    guest.write(&device, register::DRIVER_FEATURES, u32::MAX);
                }
                queues.iter().for_each(|queue| guest.publish(&device, queue));
            }
        }),
        Attack::on_all("write to the configuration space", |guest, device| {
            guest.start(device);
            for size in Size::ALL {
                for offset in (0..0x60).chain([0x7f, 0xff, 0xeff]) {
                    guest.store(size, device.register(register::CONFIG + offset), u64::MAX);
                    guest.load(size, device.register(register::CONFIG + offset));
                }
            }
        }),
        Attack::on_all("notify 5000 times", |guest, device| {
            let device_notify = device.register(register::QUEUE_NOTIFY);
            let notify = |guest: &mut Guest| {
                guest.repeat(1000, |code| {
                    [0, 1, 2, 0xffff, u32::MAX].iter().for_each(|&queue| code.store32(device_notify, queue));
                });
            };
            notify(guest);
            guest.start(device);
            notify(guest);
        }),
        Attack::on_all("acknowledge interrupts 2000 times", |guest, device| {
            guest.start(device);
            let ack = device.register(register::INTERRUPT_ACK);
            guest.repeat(500, |code| [1, 3, u32::MAX, 0].iter().for_each(|&value| code.store32(ack, value)));
        }),
        Attack::on_all("access registers with every size and alignment", |guest, device| {
            guest.start(device);
            for size in Size::ALL {
                for offset in 0..0x110 {
                    guest.load(size, device.register(offset));
                    guest.store(size, device.register(offset), 0x0101_0101_0101_0101);
                }
            }
        }),
        Attack::on_all("write random values to random registers", |guest, device| {
            let mut state = 0x9e37_79b9_7f4a_7c15 ^ u64::from(device.slot);
            let mut random = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            for _ in 0..40 {
                guest.negotiate(device);
                for _ in 0..25 {
                    let offset = (random() % 0x110) & !3;
                    let value = random() >> (random() % 64);
                    guest.write(device, offset, value as u32);
                }
                guest.write(device, register::STATUS, DRIVER_OK);
            }
        }),
    ]
}

/// Returns code that activates the device, makes requests available and resets the device, 100 times.
fn resets(guest: &mut Guest, device: &Device) -> Vec<u8> {
    let mut queues: Vec<Queue> = (0..).zip(device.queues).map(|(index, &size)| guest.queue(index, size)).collect();
    let (request, answer) = (device.request)();
    let queue = &mut queues[usize::from(device.queue)];
    for at in 0..queue.size / 2 {
        guest.request(queue, 2 * at, &request, answer);
    }
    let queue = *queue;
    let body = Guest::fragment(|body| {
        body.activate(device, &queues);
        body.publish(device, &queue);
        body.write(device, register::STATUS, 0);
    });
    Guest::fragment(|all| all.repeat(100, |code| code.raw(&body)))
}

/// Activates the device with changed queues, and offers a chain in each queue.
fn with_queues(guest: &mut Guest, device: &Device, change: impl Fn(&mut Queue)) {
    let mut queues: Vec<Queue> = (0..).zip(device.queues).map(|(index, &size)| guest.queue(index, size)).collect();
    for queue in &mut queues {
        let buffer = guest.allocate(4096);
        guest.describe(queue, 0, Desc { addr: buffer, len: 4096, flags: WRITE, next: 0 });
        guest.offer(queue, 0);
        change(queue);
    }
    guest.activate(device, &queues);
    for queue in &queues {
        guest.write(device, register::QUEUE_NOTIFY, queue.index.into());
    }
}
