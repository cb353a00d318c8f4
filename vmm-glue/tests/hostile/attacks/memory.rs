//! Attacks on the guest's memory: the balloon, virtio-mem, and accesses to memory that is not plugged.

use super::{Attack, BALLOON, HOTPLUG, MEM, RNG, SPARE_PAGE, mem_request};
use crate::assembler::Size;
use crate::guest::{Device, Guest, register};
use crate::machine::MEMORY_MIB;

const BLOCK: u64 = 2 << 20;
/// Number of pages of the guest's memory.
const PAGES: u32 = (MEMORY_MIB as u32) << 8;
/// Number of the first page that the attacker does not use.
const FREE: u32 = 0x2000;

pub fn attacks() -> Vec<Attack> {
    vec![
        Attack::on(BALLOON, "inflate the balloon with pages outside of memory", |guest, device| {
            let outside = [PAGES, PAGES + 1, 0xd_0000, 0x10_0000, u32::MAX - 1, u32::MAX];
            inflate(guest, device, outside.into_iter().cycle().take(60_000));
        }),
        Attack::on(BALLOON, "inflate the balloon in any order, and with one page many times", |guest, device| {
            inflate(guest, device, (0..65_536).map(|page| FREE + page * 7919 % (PAGES - FREE)));
            inflate(guest, device, std::iter::repeat_n(SPARE_PAGE, 65_537));
        }),
        Attack::on(BALLOON, "inflate and deflate the balloon with all free memory", |guest, device| {
            let pages: Vec<u8> = (FREE..PAGES).flat_map(u32::to_le_bytes).collect();
            for _ in 0..5 {
                let mut queues = guest.start(device);
                for queue in [0, 1, 0, 1] {
                    guest.serve(device, &mut queues[queue], &[(pages.clone(), 0)]);
                }
            }
        }),
        Attack::on(BALLOON, "inflate the balloon with the pages of the device's own queue", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[0];
            let own = [queue.desc, queue.avail, queue.used].map(|address| (address >> 12) as u32);
            let request: Vec<u8> = own.into_iter().flat_map(u32::to_le_bytes).collect();
            guest.request(queue, 0, &request, 0);
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on(BALLOON, "free page reports for the attacker's own memory", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[2];
            let own = queue.desc;
            for (at, (addr, len)) in
                (0..).zip([(own, 4096), (own + 1, 8192), (0x200_0000, 32 << 20), (0x3ff_f001, 4095)])
            {
                guest.describe(queue, at, super::queues::desc(addr, len, crate::guest::WRITE, 0));
                guest.offer(queue, at);
            }
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on(BALLOON, "write nonsense to the balloon's configuration space", |guest, device| {
            guest.start(device);
            for size in Size::ALL {
                for offset in 0..16 {
                    guest.store(size, device.register(register::CONFIG + offset), u64::MAX);
                }
            }
        }),
        Attack::on(MEM, "virtio-mem requests outside of the region, unaligned and overlapping", |guest, device| {
            let mut requests = Vec::new();
            let addresses = [
                0,
                HOTPLUG - BLOCK,
                HOTPLUG,
                HOTPLUG + 1,
                HOTPLUG + BLOCK / 2,
                HOTPLUG + 15 * BLOCK,
                HOTPLUG + (MEMORY_MIB << 20),
                1 << 63,
                u64::MAX - BLOCK + 1,
                u64::MAX,
            ];
            for address in addresses {
                for count in [0, 1, 2, 17, 0x8000, u16::MAX] {
                    for kind in [0, 0, 1, 1, 3, 4, u16::MAX] {
                        requests.push((mem_request(kind, address, count), 10));
                    }
                }
            }
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(MEM, "virtio-mem blocks plugged and unplugged 200 times", |guest, device| {
            let mut queues = guest.start(device);
            let mut requests = Vec::new();
            for round in 0..200 {
                requests.push((mem_request(0, HOTPLUG + round % 16 * BLOCK, 1), 10));
                requests.push((mem_request(1 + (round % 2) as u16, HOTPLUG + round % 16 * BLOCK, 1), 10));
            }
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(MEM, "virtio-mem requests of every length", |guest, device| {
            let request = mem_request(0, HOTPLUG, 1);
            let mut requests: Vec<_> = (1..24).map(|len| (request[..len].to_vec(), 10)).collect();
            requests.extend((0..10).map(|answer| (request.clone(), answer)));
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(MEM, "memory that is plugged, used and unplugged", |guest, device| {
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[0], &[(mem_request(0, HOTPLUG, 1), 10)]);
            guest.store(Size::Quad, HOTPLUG + 8, 7);
            guest.load(Size::Quad, HOTPLUG + BLOCK - 8);
            guest.serve(device, &mut queues[0], &[(mem_request(1, HOTPLUG, 1), 10), (mem_request(2, 0, 0), 10)]);
        }),
        Attack::on(RNG, "vCPU access to memory that is not plugged", |guest, _| {
            guest.load(Size::Quad, HOTPLUG);
        })
        .may_end("ioctl KVM_RUN failed"),
    ]
}

/// Makes one request that inflates the balloon with these pages, and waits for the answer.
fn inflate(guest: &mut Guest, device: &Device, pages: impl Iterator<Item = u32>) {
    let request: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
    let mut queues = guest.start(device);
    guest.serve(device, &mut queues[0], &[(request, 0)]);
}
