//! Frames through the queues. A pair of datagram sockets is in the tap's place: it keeps frames apart as a tap does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::Bench;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

fn interface(without: u64) -> (UnixDatagram, Bench<Net>) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    let backend = Backend { taps: vec![File::from(OwnedFd::from(tap))], vhost: None };
    let mut bench = Bench::new(Net::new(backend, MAC, 1500).unwrap());
    bench.activate_on_a_socket(without);
    (wire, bench)
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
}
