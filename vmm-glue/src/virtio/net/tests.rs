//! Frames through the queues. A pair of datagram sockets is in the tap's place: it keeps frames apart as a tap does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::Bench;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

fn interface(without: u64) -> (UnixDatagram, Bench<Net>) {
    let (mut wires, bench) = interfaces(1, without);
    (wires.remove(0), bench)
}

/// One with so many pairs of queues: a wire for each.
fn interfaces(pairs: usize, without: u64) -> (Vec<UnixDatagram>, Bench<Net>) {
    let mut wires = Vec::new();
    let taps = (0..pairs).map(|_| {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        wires.push(wire);
        File::from(OwnedFd::from(tap))
    });
    let backend = Backend { taps: taps.collect(), vhost: None };
    let mut bench = Bench::new(Net::new(backend, MAC, 1500).unwrap());
    bench.activate_on_a_socket(without);
    (wires, bench)
}

fn frame(source: [u8; 6], payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend([0xff; 6]);
    bytes.extend(source);
    bytes.extend((0..payload + 2).map(|at| at as u8));
    bytes
}

#[test]
fn frames_of_the_guest_leave_with_its_own_address_only() {
    let (wire, mut bench) = interface(0);
    let good = frame(MAC, 100);
    bench.queues[1].add(&[&good[..5], &good[5..20], &good[20..]], &[]);
    bench.queues[1].add(&[&frame([2, 0, 0, 1, 2, 4], 100)], &[]);
    bench.queues[1].add(&[&good[..HEADER + 13]], &[]);
    bench.queues[1].add(&[&good, &vec![0; 70_000]], &[]);
    bench.queues[1].add(&[], &[100]);
    let other = frame(MAC, 0);
    bench.queues[1].add(&[&other], &[]);
    bench.run();
    let mut buffer = vec![0; 2000];
    assert_eq!(wire.recv(&mut buffer).unwrap(), good.len());
    assert_eq!(buffer[..good.len()], good);
    assert_eq!(wire.recv(&mut buffer).unwrap(), other.len());
    assert!(wire.recv(&mut buffer).is_err());
    for _ in 0..6 {
        assert!(bench.queues[1].poll().is_some());
    }
}

#[test]
fn frames_to_the_guest_are_merged_over_buffers() {
    let (wire, mut bench) = interface(0);
    let (small, large) = (frame([9; 6], 50), frame([9; 6], 3000));
    wire.send(&small).unwrap();
    wire.send(&large).unwrap();
    bench.run();
    // Nothing is lost while there are no buffers.
    for _ in 0..100 {
        bench.queues[0].add(&[], &[1000]);
    }
    bench.run();
    let (_, bytes) = bench.queues[0].poll().unwrap();
    assert_eq!((bytes[10], bytes[11]), (1, 0));
    assert_eq!(bytes[12..], small[12..]);
    let mut all = Vec::new();
    for length in [1000, 1000, 1000, large.len() - 3000] {
        let (_, bytes) = bench.queues[0].poll().unwrap();
        assert_eq!(bytes.len(), length);
        all.extend(bytes);
    }
    assert_eq!((all[10], all[11]), (4, 0));
    assert_eq!(all[12..], large[12..]);
    assert!(bench.queues[0].poll().is_none());
    // What was not used for these is used for the next.
    for round in 0..200 {
        wire.send(&frame([9; 6], round)).unwrap();
        bench.run();
        assert_eq!(bench.queues[0].poll().unwrap().1.len(), HEADER + 14 + round);
        bench.queues[0].add(&[], &[1000]);
    }
}

#[test]
fn one_buffer_per_frame_without_merging() {
    let offloads = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
    let (wire, mut bench) = interface(offloads);
    for _ in 0..3 {
        bench.queues[0].add(&[], &[12, 1518]);
        wire.send(&frame([9; 6], 1000)).unwrap();
    }
    bench.run();
    for _ in 0..3 {
        let (_, bytes) = bench.queues[0].poll().unwrap();
        assert_eq!((bytes.len(), bytes[10]), (HEADER + 1014, 1));
    }
}

#[test]
fn buffers_too_small_are_given_back() {
    let (wire, mut bench) = interface(0);
    bench.queues[0].add(&[], &[2000]);
    bench.queues[0].add(&[], &[11]);
    bench.queues[0].add(&[b"wrong way"], &[]);
    bench.queues[0].add(&[], &[2000]);
    wire.send(&frame([9; 6], 10)).unwrap();
    bench.run();
    let used: Vec<usize> = std::iter::from_fn(|| bench.queues[0].poll()).map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(used, [0, 0, 0, HEADER + 24]);
}

#[test]
fn reset_and_configuration() {
    let (wire, mut bench) = interface(0);
    for _ in 0..5 {
        bench.lock().reset();
        bench.run();
        wire.send(&frame([9; 6], 10)).unwrap();
        bench.activate_on_a_socket(0);
        bench.queues[0].add(&[], &[2000]);
        bench.run();
        assert!(bench.queues[0].poll().is_some());
    }
    bench.queues[0].set_avail_index(9999);
    wire.send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert_eq!(bench.irq.needs_reset.load(Ordering::SeqCst), 1);
    let mut config = [0; 16];
    bench.lock().read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 1, 2, 3, 1, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]);
}

const PAIRS_SET: [u8; 2] = [4, 0];
const OK: &[u8] = &[0];
const ERR: &[u8] = &[1];

/// What the device says to a command on queue `control`.
fn command(bench: &mut Bench<Net>, control: usize, parts: &[&[u8]]) -> Vec<u8> {
    bench.queues[control].add(parts, &[1]);
    bench.run();
    bench.queues[control].poll().unwrap().1
}

/// A frame by each wire; whether it reached the guest.
fn heard(wires: &[UnixDatagram], bench: &mut Bench<Net>) -> Vec<bool> {
    for wire in wires {
        wire.send(&frame([9; 6], 10)).unwrap();
    }
    bench.run();
    (0..wires.len()).map(|pair| bench.queues[2 * pair].poll().is_some()).collect()
}

#[test]
fn pairs_are_used_when_the_driver_says_so() {
    let (wires, mut bench) = interfaces(2, 0);
    assert_eq!(bench.queues.len(), 5);
    let mut config = [0; 12];
    bench.lock().read_config(0, &mut config);
    assert_eq!(config[6..10], [1, 0, 2, 0]);
    for pair in 0..2 {
        for _ in 0..10 {
            bench.queues[2 * pair].add(&[], &[2000]);
        }
    }
    // The first alone, until it is told.
    assert_eq!(heard(&wires, &mut bench), [true, false]);
    let pairs = |count: u16| [&PAIRS_SET[..], &count.to_le_bytes()].concat();
    assert_eq!(command(&mut bench, 4, &[&pairs(2)]), OK);
    assert!(bench.queues[2].poll().is_some(), "what came meanwhile");
    assert_eq!(heard(&wires, &mut bench), [true, true]);
    // From the guest, each queue has its wire.
    let good = frame(MAC, 20);
    bench.queues[3].add(&[&good], &[]);
    bench.queues[3].add(&[&frame([1; 6], 20)], &[]);
    bench.run();
    assert!(wires[0].recv(&mut [0; 2000]).is_err());
    assert_eq!(wires[1].recv(&mut [0; 2000]).unwrap(), good.len());
    assert!(wires[1].recv(&mut [0; 2000]).is_err());
    // Impossible numbers change nothing, nor does anything else, in however many parts it comes.
    for bad in [0, 3, 0x8000, 0xffff] {
        assert_eq!(command(&mut bench, 4, &[&pairs(bad)]), ERR, "{bad} pairs");
    }
    for bad in [&[4, 0, 1][..], &[4, 0, 1, 0, 0], &[4, 1, 1, 0], &[0, 0, 1, 0], &[1], &[0; 5000]] {
        assert_eq!(command(&mut bench, 4, &[bad]), ERR, "{:?}", bad.len());
    }
    assert_eq!(heard(&wires, &mut bench), [true, true]);
    assert_eq!(command(&mut bench, 4, &[&[4], &[0, 1], &[0]]), OK);
    assert_eq!(heard(&wires, &mut bench), [true, false]);
    // Nowhere to answer to: not done, and given back.
    bench.queues[4].add(&[&pairs(2)], &[]);
    bench.run();
    assert_eq!(bench.queues[4].poll().unwrap().1.len(), 0);
    assert_eq!(heard(&wires, &mut bench), [true, false]);
    assert!(bench.irq.queues[4].load(Ordering::SeqCst) > 0);
    // A reset is the beginning again.
    assert_eq!(command(&mut bench, 4, &[&pairs(2)]), OK);
    bench.lock().reset();
    bench.run();
    bench.activate_on_a_socket(0);
    for pair in 0..2 {
        bench.queues[2 * pair].add(&[], &[2000]);
    }
    assert_eq!(heard(&wires, &mut bench), [true, false]);
}

#[test]
fn a_driver_may_do_without_pairs_and_without_the_control_queue() {
    // Without VIRTIO_NET_F_MQ the third queue is the control queue.
    let (wires, mut bench) = interfaces(2, 1 << VIRTIO_NET_F_MQ);
    bench.queues[0].add(&[], &[2000]);
    wires[0].send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert!(bench.queues[0].poll().is_some());
    assert_eq!(command(&mut bench, 2, &[&[4, 0, 1, 0]]), OK);
    assert_eq!(command(&mut bench, 2, &[&[4, 0, 2, 0]]), ERR);
    let (wires, mut bench) = interfaces(2, 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ);
    bench.queues[0].add(&[], &[2000]);
    bench.queues[2].add(&[&[4, 0, 1, 0]], &[1]);
    wires[0].send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert!(bench.queues[0].poll().is_some());
    assert!(bench.queues[2].poll().is_none(), "nobody serves it");
}

#[test]
fn a_device_without_several_pairs_offers_none() {
    let (_, bench) = interfaces(1, 0);
    assert_eq!(bench.queues.len(), 2);
    assert_eq!(bench.lock().features() & (1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ), 0);
    let none = || Backend { taps: Vec::new(), vhost: None };
    assert!(Net::new(none(), MAC, 1500).is_err());
    let file = || tempfile::tempfile().unwrap();
    assert!(Net::new(Backend { taps: (0..9).map(|_| file()).collect(), vhost: None }, MAC, 1500).is_err());
}

#[test]
fn the_loop_goes_on_where_the_kernel_cannot() {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    // No vhost-net, whatever it is.
    let vhost = Some(File::open("/dev/null").unwrap());
    let backend = Backend { taps: vec![File::from(OwnedFd::from(tap))], vhost };
    let mut bench = Bench::new(Net::new(backend, MAC, 1500).unwrap());
    for _ in 0..2 {
        bench.activate_on_a_socket(0);
        for round in 0..500 {
            bench.queues[0].add(&[], &[2000]);
            bench.queues[1].add(&[&frame(MAC, round)], &[]);
            wire.send(&frame([9; 6], round)).unwrap();
            bench.run();
            assert!(bench.queues[0].poll().is_some() && bench.queues[1].poll().is_some(), "round {round}");
            assert_eq!(wire.recv(&mut [0; 2000]).unwrap(), HEADER + 14 + round);
        }
        bench.lock().reset();
        bench.run();
    }
    assert_eq!(bench.irq.handed_over.load(Ordering::SeqCst), 1, "tried once");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_chains(
        frames in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..20),
        buffers in proptest::collection::vec(0usize..3000, 1..30),
    ) {
        let (wire, mut bench) = interface(0);
        for &length in &buffers {
            bench.queues[0].add(&[], &[length]);
        }
        for (bytes, own) in &frames {
            let start = frame(if *own { MAC } else { [1; 6] }, 0);
            bench.queues[1].add(&[&start, bytes], &[]);
            let _ = wire.send(bytes);
        }
        bench.run();
        let mut sent = 0;
        while wire.recv(&mut [0; 2000]).is_ok() {
            sent += 1;
        }
        prop_assert_eq!(sent, frames.iter().filter(|(_, own)| *own).count());
    }

    #[test]
    fn hostile_commands(
        commands in proptest::collection::vec((proptest::collection::vec(0u8..6, 1..7), 0usize..3), 1..30),
    ) {
        let (wires, mut bench) = interfaces(2, 0);
        let mut pairs = 1;
        for (bytes, room) in &commands {
            let writable: &[usize] = if *room > 0 { &[*room] } else { &[] };
            bench.queues[4].add(&[bytes], writable);
            bench.run();
            let (_, answer) = bench.queues[4].poll().unwrap();
            let good = *room > 0 && matches!(bytes[..], [4, 0, 1..=2, 0]);
            if good {
                pairs = usize::from(bytes[2]);
            }
            prop_assert_eq!(answer, if *room > 0 { vec![u8::from(!good)] } else { Vec::new() });
        }
        for pair in 0..2 {
            bench.queues[2 * pair].add(&[], &[2000]);
        }
        prop_assert_eq!(heard(&wires, &mut bench), [true, pairs == 2]);
    }
}
