//! Attacks on an interface whose queues vhost-net serves: the host's kernel reads the rings in guest memory itself.

use super::{Attack, BALLOON, Expect, HOTPLUG, MEM, NET, disk_and_net, mem_request, queues, transport};
use crate::guest::{Desc, Device, Guest, INDIRECT_DESC, NEXT, Queue, WRITE, register};
use crate::machine::MAC;

/// An interface whose transmit queue is attacked.
const TRANSMIT: Device =
    Device { name: "vhost-net transmit", vhost: true, features: NET.features | INDIRECT_DESC, ..NET };
/// An interface whose receive queue is attacked. The host sends frames all the time.
const RECEIVE: Device = Device { name: "vhost-net receive", queue: 0, request: || (Vec::new(), 2048), ..TRANSMIT };

pub fn attacks() -> Vec<Attack> {
    let both = |attack: Attack| Attack { devices: vec![TRANSMIT, RECEIVE], ..attack };
    let one = |attack: Attack| Attack { devices: vec![TRANSMIT], ..attack };
    let survives = |attack: &Attack| attack.expect == Expect::Survives;
    // If a frame is shorter than its header, vhost-net keeps the frame and never returns the chain (`handle_tx_copy` in
    // drivers/vhost/net.c). Therefore, an attack that waits for all such chains would wait forever.
    let of_net = |attack: &Attack| {
        attack.devices.iter().any(|device| device.name == NET.name)
            && !attack.name.starts_with("frames of every length")
    };
    let mut attacks: Vec<Attack> = transport::attacks().into_iter().map(one).collect();
    attacks.extend(queues::attacks().into_iter().filter(survives).map(both));
    attacks.extend(disk_and_net::attacks().into_iter().filter(of_net).map(one));
    attacks.extend(own().into_iter().map(one));
    attacks.extend(own_of_both().into_iter().map(both));
    attacks
}

/// Attacks on either queue that concern vhost-net only.
fn own_of_both() -> Vec<Attack> {
    vec![
        Attack::on_all("buffers in memory that is not plugged", |guest, device| {
            queues::offer(guest, device, |_, _| vec![queues::desc(HOTPLUG, 64, 0, 0)]);
            queues::offer(guest, device, |_, _| vec![queues::desc(HOTPLUG, 2048, WRITE, 0)]);
            queues::offer(guest, device, |_, buffer| {
                vec![queues::desc(buffer, 64, NEXT, 1), queues::desc(HOTPLUG + 4096, 512, 0, 0)]
            });
        }),
        Attack::on_all("queue whose pages the balloon takes while vhost-net serves the queue", |guest, device| {
            let mut balloon = guest.start(&BALLOON);
            let mut queue = guest.start(device)[usize::from(device.queue)];
            let pages = [queue.desc, queue.avail, queue.used].map(|address| (address >> 12) as u32);
            let request: Vec<u8> = pages.into_iter().flat_map(u32::to_le_bytes).collect();
            guest.serve(&BALLOON, &mut balloon[0], &[(request, 0)]);
            queue.offered += 1;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on_all("queue in memory that is unplugged while vhost-net serves it", |guest, device| {
            let mut mem = guest.start(&MEM);
            guest.serve(&MEM, &mut mem[0], &[(mem_request(0, HOTPLUG, 1), 10)]);
            let mut queues = [guest.queue(0, 256), guest.queue(1, 256)];
            let queue = &mut queues[usize::from(device.queue)];
            (queue.desc, queue.avail, queue.used) = (HOTPLUG, HOTPLUG + 0x2000, HOTPLUG + 0x3000);
            guest.start_vhost(device, &mut queues);
            guest.serve(&MEM, &mut mem[0], &[(mem_request(1, HOTPLUG, 1), 10)]);
            guest.write(device, register::QUEUE_NOTIFY, device.queue.into());
            wait_for_reset_request(guest, device);
        }),
    ]
}

/// Starts the device, and fills the transmit queue with one frame. The device has not been notified yet.
fn start_with_full_queue(guest: &mut Guest, device: &Device) -> Queue {
    let mut queue = guest.start(device)[usize::from(NET.queue)];
    let (request, _) = (NET.request)();
    guest.request(&mut queue, 0, &request, 0);
    (1..queue.size).for_each(|_| guest.offer(&mut queue, 0));
    queue
}

/// Attacks on the whole interface that concern vhost-net only.
fn own() -> Vec<Attack> {
    vec![
        Attack::on_all("frames that are too short or too long, with nonsense in their headers", |guest, device| {
            for header in [[0u8; 12], [0xff; 12], [1, 4, 0xff, 0xff, 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]] {
                for len in [1, 11, 12, 13, 25, 26, 1526, 65_600, 200_000] {
                    let mut frame = [&header[..], &[0xff; 6], &MAC, &[8, 0]].concat();
                    frame.resize(len, 0x45);
                    let frame = guest.buffer(&frame);
                    queues::offer(guest, device, |_, _| vec![queues::desc(frame, len as u32, 0, 0)]);
                }
            }
        }),
        Attack::on_all("reset while vhost-net serves full queues, 20 times", |guest, device| {
            for _ in 0..20 {
                let queue = start_with_full_queue(guest, device);
                guest.publish(device, &queue);
                guest.write(device, register::STATUS, 0);
            }
        }),
        Attack::on_all("reset from the second vCPU while vhost-net serves full queues", |guest, device| {
            let queue = start_with_full_queue(guest, device);
            let resets =
                Guest::fragment(|body| body.repeat(200, |code| code.store32(device.register(register::STATUS), 0)));
            let done = guest.on_second_vcpu(&resets);
            guest.repeat(300, |code| {
                code.add16(queue.avail + 2, queue.size);
                code.store32(device.register(register::QUEUE_NOTIFY), queue.index.into());
            });
            guest.wait16(done, 0);
        }),
        Attack::on_all("receive queue whose parts have the same address", |guest, device| {
            with_receive_queue(guest, device, |queue, _| (queue.avail, queue.used) = (queue.desc, queue.desc));
        }),
        Attack::on_all("receive queue at the address of the transmit queue", |guest, device| {
            with_receive_queue(guest, device, |queue, transmit| {
                (queue.desc, queue.avail, queue.used) = (transmit.desc, queue.avail, transmit.used);
            });
        }),
        Attack::on_all("receive buffers that are the rings of both queues", |guest, device| {
            let mut queues = guest.start(device);
            let addresses: Vec<u64> = queues.iter().flat_map(|queue| [queue.desc, queue.avail, queue.used]).collect();
            let receive = &mut queues[0];
            for at in 0..receive.size {
                let addr = addresses[usize::from(at) % addresses.len()];
                guest.describe(receive, at, Desc { addr, len: 4096, flags: WRITE, next: 0 });
                guest.offer(receive, at);
            }
            let receive = *receive;
            guest.publish(device, &receive);
            guest.settle(device, &receive);
        }),
    ]
}

/// Starts vhost-net with a changed receive queue, and makes buffers available in this queue. `change` gets the receive
/// queue and the transmit queue.
fn with_receive_queue(guest: &mut Guest, device: &Device, change: fn(&mut crate::guest::Queue, &crate::guest::Queue)) {
    let mut queues = [guest.queue(0, 256), guest.queue(1, 256)];
    let [receive, transmit] = &mut queues;
    change(receive, transmit);
    guest.start_vhost(device, &mut queues);
    let buffer = guest.allocate(4096);
    let receive = queues[0];
    for (offset, byte) in (0..).zip(queues::desc(buffer, 2048, WRITE, 0).bytes()) {
        guest.store(crate::assembler::Size::Byte, receive.desc + offset, byte.into());
    }
    guest.store16(receive.avail + 2, 200);
    guest.write(device, register::QUEUE_NOTIFY, 0);
    guest.settle(device, &receive);
}

/// Waits until the device asks for a reset.
fn wait_for_reset_request(guest: &mut Guest, device: &Device) {
    let status = device.register(register::STATUS);
    guest.wait32_has(status, crate::guest::NEEDS_RESET);
}
