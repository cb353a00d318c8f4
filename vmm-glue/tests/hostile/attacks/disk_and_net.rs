//! Attacks with disk requests, network frames and entropy requests.

use super::queues::desc;
use super::{Attack, BLK, NET, RNG, disk_request};
use crate::guest::{Desc, NEXT, WRITE};
use crate::machine::MAC;

const SECTORS: u64 = 8 << 11;

pub fn attacks() -> Vec<Attack> {
    vec![
        Attack::on(BLK, "disk requests of every type and length, and beyond the end of the disk", |guest, device| {
            let mut requests = Vec::new();
            for kind in (0..16).chain([0x8000_0000, u32::MAX]) {
                for sector in [0, SECTORS - 1, SECTORS, 1 << 54, u64::MAX] {
                    for (data, answer) in
                        [(0, 1), (0, 0), (0, 513), (0, 100), (512, 1), (511, 1), (16, 1), (4096, 4097)]
                    {
                        let request = [disk_request(kind, sector), vec![0xff; data]].concat();
                        requests.push((request, answer));
                    }
                }
            }
            // These requests are shorter than a header.
            requests.extend((1..16).map(|len| (vec![0; len], 513)));
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(BLK, "discard and write-zeroes requests with ranges beyond the end of the disk", |guest, device| {
            let range =
                |sector: u64, sectors: u32| [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0xff; 4]].concat();
            let mut requests = Vec::new();
            for kind in [11, 13] {
                for sector in [0, SECTORS - 1, SECTORS, u64::MAX] {
                    for sectors in [0, 1, 2, 1 << 17, u32::MAX] {
                        for count in [1, 16, 17, 255] {
                            let request = [disk_request(kind, 0), range(sector, sectors).repeat(count)].concat();
                            requests.push((request, 1));
                        }
                    }
                }
            }
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(BLK, "disk request with a descriptor for each byte", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[0];
            let header = guest.buffer(&disk_request(0, 0));
            let answer = guest.allocate(4096);
            for at in 0..16 {
                guest.describe(queue, at, desc(header + u64::from(at), 1, NEXT, at + 1));
            }
            for at in 16..queue.size {
                let last = at == queue.size - 1;
                let flags = if last { WRITE } else { WRITE | NEXT };
                guest.describe(
                    queue,
                    at,
                    desc(answer + u64::from(at), if last { 512 - 110 } else { 1 }, flags, at + 1),
                );
            }
            guest.offer(queue, 0);
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
        Attack::on(NET, "frames of every length, with nonsense in their headers", |guest, device| {
            let mut requests = Vec::new();
            for header in [
                [0u8; 12],
                [0xff; 12],
                [1, 4, 0xff, 0xff, 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
                [0, 5, 0, 0, 0, 0, 1, 0, 0, 0, 9, 9],
            ] {
                for len in [0, 1, 5, 13, 14, 59, 1514, 1515, 9000, 65_535, 65_562, 66_000, 200_000] {
                    let mut frame = [&[0xff; 6][..], &MAC, &[8, 0]].concat();
                    frame.resize(len, 0x45);
                    requests.push(([&header[..], &frame].concat(), 0));
                }
            }
            requests.extend((1..12).map(|len| (vec![0; len], 0)));
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[1], &requests);
        }),
        Attack::on(NET, "frames whose source MAC is not the interface's", |guest, device| {
            let frame = |source: [u8; 6]| [&[0; 12][..], &[0xff; 6], &source, &[8, 6], &[0; 46]].concat();
            let sources = [[0; 6], [0xff; 6], [2, 0, 0, 0, 0, 2], [1, 0, 0x5e, 0, 0, 1]];
            let requests: Vec<_> = sources.into_iter().map(|source| (frame(source), 0)).collect();
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[1], &requests);
        }),
        Attack::on(NET, "flood of 25600 frames, with tiny receive buffers", |guest, device| {
            let mut queues = guest.start(device);
            for at in 0..queues[0].size {
                let addr = guest.allocate(16);
                guest.describe(
                    &queues[0].clone(),
                    at,
                    Desc { addr, len: 1 + u32::from(at) % 16, flags: WRITE, next: 0 },
                );
                guest.offer(&mut queues[0], at);
            }
            let rx = queues[0];
            guest.publish(device, &rx);
            let queue = &mut queues[1];
            guest.request(queue, 0, &(device.request)().0, 0);
            (1..queue.size).for_each(|_| guest.offer(queue, 0));
            let queue = *queue;
            guest.serve_again(device, &queue, 100);
        }),
        Attack::on(RNG, "requests for 4 GiB of entropy", |guest, device| {
            let mut queues = guest.start(device);
            let queue = &mut queues[0];
            for at in 0..queue.size {
                let flags = if at == queue.size - 1 { WRITE } else { WRITE | NEXT };
                guest.describe(queue, at, desc(0x200_0000, 32 << 20, flags, at + 1));
            }
            (0..queue.size).for_each(|_| guest.offer(queue, 0));
            let queue = *queue;
            guest.publish(device, &queue);
            guest.settle(device, &queue);
        }),
    ]
}
