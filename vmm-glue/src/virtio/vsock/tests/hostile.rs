//! Tests with a hostile guest: invalid packets, lengths and rings, and resets at any time.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;

#[test]
fn data_beyond_credit_resets_connection() {
    let mut guest = Guest::new(0);
    let (side, _stream) = guest.open(1);
    for _ in 0..20 {
        guest.send(side, Op::ReadWrite, 0, 0, &[0; 65536]);
    }
    assert!(guest.ops().contains(&Op::Reset));
    assert_eq!(guest.connections(), 0);
}

#[test]
fn packets_without_connection_are_refused() {
    let mut guest = Guest::new(0);
    let (side, _stream) = guest.open(1);
    let unknown = Side { host: 77, guest: 88 };
    guest.send(unknown, Op::Request, 0, 0, &[]);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.dst_port, packets[0].0.src_port), (Op::Reset, 88, 77));
    guest.send(unknown, Op::Reset, 0, 0, &[]);
    guest.send(Side { guest: 2, ..side }, Op::ReadWrite, 0, 0, b"forged");
    assert_eq!(guest.ops(), [Op::Reset]);
    let header = Header { src_cid: 9, ..Guest::header(side, Op::Reset) };
    guest.send_raw(&[&header.to_bytes()]);
    assert_eq!((guest.ops(), guest.connections()), (vec![], 1));
}

#[test]
fn invalid_lengths_reset_connection() {
    for (len, sent) in [(5, 4), (u32::MAX, 0), (65537, 65537), (1, 0)] {
        let mut guest = Guest::new(0);
        let (side, _stream) = guest.open(1);
        let header = Header { len, ..Guest::header(side, Op::ReadWrite) };
        guest.send_raw(&[&header.to_bytes(), &vec![0; sent]]);
        assert_eq!(
            guest.ops(),
            [Op::Reset],
            "the device must reset a connection if the header has length {len} and the data has {sent} bytes"
        );
        assert_eq!(guest.connections(), 0);
    }
    let mut guest = Guest::new(0);
    guest.send_raw(&[&[1; HEADER_LEN - 1]]);
    guest.bench.queues[0].add(&[], &[HEADER_LEN]);
    let (_, _stream) = guest.open(3);
}

#[test]
fn resets_are_sent_when_there_are_receive_buffers() {
    let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).unwrap());
    bench.activate(0);
    let mut guest = Guest { bench };
    for port in 0..100 {
        guest.bench.queues[1].add(&[&Guest::header(Side { host: 1, guest: port }, Op::Request).to_bytes()], &[]);
    }
    guest.bench.run();
    guest.refill(120);
    let mut resets = 0;
    for _ in 0..4 {
        resets += guest.packets().len();
    }
    assert_eq!(resets, 100);
}

#[test]
fn broken_ring_stops_device_until_reset() {
    let mut guest = Guest::new(0);
    let (_, mut stream) = guest.open(1);
    guest.bench.queues[1].set_avail_index(40_000);
    guest.bench.run();
    assert_eq!(guest.bench.irq.needs_reset.load(Ordering::SeqCst), 1);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    guest.bench.lock().reset();
    guest.bench.activate(0);
    guest.refill(8);
    guest.open(2);
}

#[test]
fn device_reset_ends_connections_and_connection_attempts() {
    let mut guest = Guest::new(0);
    for round in 0..20 {
        let (_side, mut stream) = guest.open(round);
        let reply = guest.connect(round);
        guest.bench.lock().reset();
        assert_eq!(reply.try_recv().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
        guest.bench.activate(0);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        guest.refill(16);
    }
}

#[test]
fn refused_connections_leave_nothing_if_the_guest_offers_no_receive_buffers() {
    let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).unwrap());
    bench.activate(0);
    let mut guest = Guest { bench };
    for port in 0..20 {
        let reply = guest.connect(port);
        let host = *guest.bench.lock().connections.keys().next().unwrap();
        guest.send(Side { host, guest: port }, Op::Reset, 0, 0, &[]);
        assert_eq!(reply.try_recv().unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!((guest.connections(), guest.bench.lock().ready.len()), (0, 0));
    }
}

/// An orphan is a connection whose client has closed its end ([`Connection::is_orphan`]). The device must remove an
/// orphan even if there is no receive buffer for the orphan's RST packet.
#[test]
fn connections_stay_bounded_if_the_guest_offers_no_receive_buffers() {
    let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).unwrap());
    bench.activate(0);
    let mut guest = Guest { bench };
    guest.refill(1);
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS as u32).map(|port| guest.open(port).1).collect();
    let refused = guest.connect(1).try_recv().unwrap();
    assert!(refused.is_err(), "the device opened more connections than the maximum");
    // One client closes its socket, and the device sends SHUTDOWN in the only receive buffer. The connection is now an
    // orphan. The device keeps the orphan until a new connection needs its place.
    streams.pop();
    assert_eq!(guest.connections(), MAX_CONNECTIONS);
    let replies: Vec<_> = (0..10).map(|port| guest.connect(port)).collect();
    let refused = replies.iter().filter(|reply| matches!(reply.try_recv(), Ok(Err(_)))).count();
    assert_eq!((guest.connections(), refused), (MAX_CONNECTIONS, 9));
    guest.refill(8);
    assert_eq!(guest.ops(), [Op::Shutdown, Op::Reset, Op::Request]);
    assert_eq!(guest.connections(), MAX_CONNECTIONS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn header_round_trip(bytes: [u8; 32], more: [u8; 12]) {
        let mut all = [0; HEADER_LEN];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&more);
        prop_assert_eq!(Header::parse(&all).to_bytes(), all);
    }

    /// The device must not panic, no matter what packets the guest sends. The device must continue or request a reset.
    #[test]
    fn hostile_packets_do_not_panic(packets in proptest::collection::vec(
        (0u16..9, any::<u32>(), any::<u32>(), any::<u32>(), 0u32..70_000, 0usize..3000, any::<bool>()), 1..40)) {
        let mut guest = Guest::new(0);
        let (side, mut stream) = guest.open(1);
        for (op, flags, buf_alloc, fwd_cnt, len, real, honest) in packets {
            let header = Header {
                op: op.into(), flags, buf_alloc, fwd_cnt,
                len: if honest { real as u32 } else { len },
                ..Guest::header(side, Op::Reset)
            };
            guest.send_raw(&[&header.to_bytes(), &vec![7; real]]);
            let _ = stream.write(&[1; 1000]);
            let _ = stream.read(&mut [0; 500]);
            guest.packets();
        }
    }

    /// The device must not panic, no matter what descriptors the guest writes. `run` checks that the device stops
    /// causing events.
    #[test]
    fn hostile_descriptors_do_not_panic(
        queue in 0usize..3,
        descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, any::<u16>()), 8),
        near in any::<bool>(),
        heads in proptest::collection::vec(0u16..200, 1..20),
    ) {
        let mut guest = Guest::new(0);
        let queue = if queue == 0 { 1 } else { queue };
        for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
            let (address, len) = if near { (address % (96 << 20), len % 100_000) } else { (address, len) };
            guest.bench.queues[queue].write_descriptor(index as u16, address, len, flags, next % 16);
        }
        let heads: Vec<u16> = heads.into_iter().take(7).collect();
        for head in heads {
            guest.bench.queues[queue].offer(head);
        }
        guest.bench.run();
    }
}
